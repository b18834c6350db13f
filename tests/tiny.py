"""The smallest model and router that show everything: two blocks, six calls, four different graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.build.router_file import write_router
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.calibration import Calibration
from l2c_export.core.models import DiTConfig, ModelConfig
from l2c_export.core.plan import Plan
from l2c_export.core.schedule import Router
from l2c_export.evidence.calibrate import calibrate

CONFIG = DiTConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
)
SEED = 3

# What sigmoid makes of the scores, call by call: the odd calls may reuse.
SCORES = [
    [0.50, 0.50, 0.50, 0.50],
    [0.05, 0.90, 0.90, 0.15],
    [0.50, 0.50, 0.50, 0.50],
    [0.05, 0.05, 0.90, 0.05],
    [0.50, 0.50, 0.50, 0.50],
    [0.05, 0.05, 0.05, 0.05],
]


def write_files(folder: Path, model: DiTConfig = CONFIG) -> tuple[Path, Path]:
    """Write a model's configuration and a router for two blocks; return their paths."""
    config, router = folder / "model.json", folder / "router.safetensors"
    config.write_text(json.dumps(model.to_json()))
    scores = np.array(SCORES)
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    made = Router(logits, np.arange(len(scores)) % 2 == 1, "ddim")
    write_router(router, made, family="dit", slots=CONFIG.slots, training={"made": "up"})
    return config, router


def plan(folder: Path, **options: Any) -> Plan:
    """The plan that options of the command line would give."""
    config, router = folder / "model.json", folder / "router.safetensors"
    given = {"router": None if options.get("uncached") else router} | options
    return plan_from_options(ScheduleOptions(model_config=config, **given))


def request(plan: Plan, seed: int = SEED, **changes: Any) -> Request:
    """A build of the plan with random weights."""
    return Request(plan, random_checkpoint(plan.config, seed), **({"batch": (1, 2)} | changes))


def calibration(folder: Path, model: ModelConfig = CONFIG) -> Calibration:
    """What the model with the weights of :func:`request` takes, from a bundle that is made for it."""
    folder.mkdir(exist_ok=True)
    config = folder / "model.json"
    config.write_text(json.dumps(model.to_json()))
    options = ScheduleOptions(model_config=config, uncached=True, steps=4, batch=(1, 2))
    return calibrate(build_bundle(folder / "bundle", request(plan_from_options(options))), 2, SEED)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, byte for byte."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
