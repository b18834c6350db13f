"""The whole path, from checkpoint and router files to latents, against the official code's results.

To export 28 blocks takes half a minute, so this is slow. What runs each time says the same in two
parts: the eager reference is the official code (test_reference.py), bundles are the eager reference.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import open_checkpoint
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.models import read_model_config
from l2c_export.runtime import Runner

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"
TOLERANCE = 1e-5  # of the largest value; float32 against float64 of the official code differs by 7e-7


def case_files(name):
    """The case's folder and its router; the released router is never part of this project."""
    if name == "dit-ddim20":
        return DATA / name, DATA / name / "router.pt"
    folder, router = SHARED / "golden" / name, SHARED / "routers" / "DDIM20_router.pt"
    if not (folder.is_dir() and router.is_file()):
        pytest.skip("the released routers are not part of this project, and ../shared is not here")
    return folder, router


@pytest.fixture(scope="module", params=["dit-ddim20", "dit-ddim20-official-router"])
def built(request, tmp_path_factory):
    folder, router = case_files(request.param)
    case = json.loads((folder / "case.json").read_text())
    options = ScheduleOptions(
        model_config=folder / "case.json", router=router, threshold=case["threshold"], batch=(2, 2)
    )
    config = read_model_config(folder / "case.json")
    built = build_bundle(
        tmp_path_factory.mktemp("golden") / "bundle",
        Request(
            plan_from_options(options),
            open_checkpoint(folder / "model.pt", config),
            batch=(2, 2),
            guidance_scale=case["cfg_scale"],
        ),
    )
    return Runner.load(built.path), np.load(folder / "expected.npz")


@pytest.mark.parametrize("kind", ["cached", "uncached"])
def test_every_latent_is_that_of_the_official_code(built, kind):
    runner, expected = built
    seen = []
    runner.sample(
        expected["labels"],
        noise=expected["noise"],
        cached=kind == "cached",
        callback=lambda index, timestep, x: seen.append(x.copy()),
    )
    assert len(seen) == len(expected[kind]) == 20
    for ours, official in zip(seen, expected[kind], strict=True):
        assert np.abs(ours - official).max() / np.abs(official).max() < TOLERANCE


def test_caching_moves_the_latents_by_more_than_the_tolerance(built):
    _, expected = built
    moved = np.abs(expected["cached"][-1] - expected["uncached"][-1]).max()
    assert moved / np.abs(expected["uncached"][-1]).max() > 100 * TOLERANCE
