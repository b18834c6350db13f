"""DiT-XL/2 with random weights: what must hold whatever the machine's speed."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from l2c_export.core.bundle import WEIGHTS, read_bundle
from l2c_export.evidence.bench import measure_memory

ROUTER = Path(__file__).parents[2] / "shared" / "routers" / "DDIM20_router.pt"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not ROUTER.is_file():
        pytest.skip("the released routers are not part of this project, and ../shared is not here")
    folder = tmp_path_factory.mktemp("xl") / "bundle"
    if shutil.disk_usage(folder.parent).free < 6e9:
        pytest.skip("DiT-XL/2 needs 3 GB of disk, and a margin")
    command = ["build", "--model", "dit-xl-2", "--router", str(ROUTER), "--random-weights", "0"]
    start = "from l2c_export.cli import main; main()"
    subprocess.run([sys.executable, "-c", start, *command, "-o", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


def test_the_build_holds_one_tensor_at_a_time(folder):
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert largest_child < 1.5e9


def test_the_bundle_is_hardly_larger_than_its_weights(folder):
    files = read_bundle(folder).manifest.files
    assert sum(file.bytes for file in files.values()) <= 1.03 * files[WEIGHTS].bytes


def test_all_graphs_together_hold_the_weights_once(folder):
    held = measure_memory(folder, read_bundle(folder).manifest)
    assert held["of_weights"] <= 1.35
