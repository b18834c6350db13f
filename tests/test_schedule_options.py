"""From options to a plan: what is taken with a word of warning."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import torch

from l2c_export.build.download import ROUTERS, released_for
from l2c_export.build.schedule_options import ScheduleOptions, router_from_options


@pytest.fixture
def router(tmp_path) -> Path:
    """As the authors' code writes one for DiT-XL/2 at 256 pixels, with made-up scores."""
    rows = {f"{row}.prob": torch.zeros(56) for row in range(4)}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    torch.save({"routers": rows, "args": args}, tmp_path / "router.pt")
    return tmp_path / "router.pt"


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ("dit-xl-2", None),
        ("dit-xl-4", "(patch_size 4, not 2)"),
        ("dit-xl-2-512", "(input_size 64, not 32)"),
    ],
)
def test_a_router_of_another_model_is_taken_with_a_warning(router, caplog, model, difference):
    options = ScheduleOptions(model=model, router=router)
    with caplog.at_level(logging.WARNING, "l2c_export"):
        assert router_from_options(options, options.config).calls == 4
    said = [record.getMessage() for record in caplog.records if record.name.startswith("l2c_export")]
    if difference is None:
        assert not said
    else:
        (line,) = said
        assert line.startswith("router router.pt was trained for dit-xl-2, and this model is another")
        assert difference in line


def test_released_routers_are_known_by_their_digests():
    for (preset, _, _), file in ROUTERS.items():
        assert released_for(file.sha256) == preset
    assert released_for("0" * 64) is None
