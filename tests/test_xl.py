"""DiT-XL/2 with random weights: what must hold whatever the machine's speed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from l2c_export.core.bundle import WEIGHTS, read_bundle
from l2c_export.evidence.bench import measure_memory

ROUTER = Path(__file__).parents[2] / "shared" / "routers" / "DDIM20_router.pt"

pytestmark = pytest.mark.slow


BUILD = """
from l2c_export.cli import main

try:
    main()
finally:
    print(open("/proc/self/status").read())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle's folder, and the bytes of memory that building it took at most."""
    if not ROUTER.is_file():
        pytest.skip("the released routers are not part of this project, and ../shared is not here")
    folder = tmp_path_factory.mktemp("xl") / "bundle"
    if shutil.disk_usage(folder.parent).free < 6e9:
        pytest.skip("DiT-XL/2 needs 3 GB of disk, and a margin")
    command = ["build", "--model", "dit-xl-2", "--router", str(ROUTER), "--random-weights", "0"]
    child = [sys.executable, "-c", BUILD, *command, "-o", str(folder)]
    said = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", said)
    yield folder, int(peak) * 1024
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(built):
    return built[0]


def test_the_build_holds_one_tensor_at_a_time(built):
    assert built[1] < 0.8e9  # the weights are 2.7e9


def test_the_bundle_is_hardly_larger_than_its_weights(folder):
    files = read_bundle(folder).manifest.files
    assert sum(file.bytes for file in files.values()) <= 1.03 * files[WEIGHTS].bytes


def test_all_graphs_together_hold_the_weights_once(folder):
    held = measure_memory(folder, read_bundle(folder).manifest)
    assert held["of_weights"] <= 1.35
