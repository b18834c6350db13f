"""The tolerances of ``l2c-export verify`` beside the errors that they were taken from.

    python examples/tolerances.py

builds five small models in every precision that has a tolerance, verifies each bundle with several
seeds, beside its own weights and beside the checkpoint, and prints the worst errors, cached or not,
beside what is allowed. It ends with 1 where a tolerance is less than 1.5 times or more than 5 times
what it is for. Nothing is downloaded; it takes about twenty minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from l2c_export.build.build import Request, build_bundle
from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
from l2c_export.build.router_file import write_router
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.models import DiTConfig, UViTConfig
from l2c_export.core.precision import precision_of
from l2c_export.core.schedule import Router
from l2c_export.evidence.calibrate import calibrate
from l2c_export.evidence.compare import Tolerance, rank
from l2c_export.evidence.demo import ASSETS as DEMO
from l2c_export.evidence.verify import ROUNDED, TOLERANCES, Report, Settings, verify
from l2c_export.runtime import Runner

ASSETS = Path(__file__).resolve().parent / "assets"
OFFICIAL = Path(__file__).resolve().parents[1] / "tests" / "data"  # in the official code's own files
PARTS = ("slots", "output", "latent")
MARGIN = (1.5, 5.0)
CALIBRATION = 8  # trajectories
ANY = 1e9  # a tolerance that everything finite passes

TWO_BLOCKS = DiTConfig(2, 32, 2, 2, 8, num_classes=10, mlp_ratio=2.0)
OFFICIAL_UVIT = UViTConfig(28, 48, 4, 2, 8, num_classes=10, conv=False)


@dataclass(frozen=True)
class Model:
    """A model, its schedule, and the guidance scale that it is sampled with."""

    name: str
    config: Path
    checkpoint: Path
    scale: float
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """The worst error of one kind, beside what is allowed.

    Attributes:
        precision: Of the bundles, and beside which weights.
        part: ``slots``, ``output`` or ``latent``.
        worst: Of all models and seeds.
        model: Where it was.
        allowed: By the tolerance.
    """

    precision: str
    part: str
    worst: float
    model: str
    allowed: float

    @property
    def margin(self) -> float:
        """How many times the worst error is allowed."""
        return self.allowed / self.worst

    @property
    def sound(self) -> bool:
        """Whether the tolerance is neither tight nor loose; one for any model may be loose."""
        borrowed = self.precision.startswith("float32") or "unrounded" in self.precision
        loosest = float("inf") if borrowed else MARGIN[1]
        return MARGIN[0] <= self.margin <= loosest


def make_models(folder: Path) -> list[Model]:
    """Two blocks of random weights, the two models of digits, and two of 28 blocks, random too."""
    for name, config in (("two", TWO_BLOCKS), ("uvit", OFFICIAL_UVIT)):
        (folder / f"{name}.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    save_file(dict(random_checkpoint(TWO_BLOCKS, 3).iter_tensors()), folder / "two.safetensors")
    logits = np.where(np.arange(4) % 3 == np.arange(6)[:, None] % 3, 3, -3).astype(np.float32)
    router = Router(logits, np.arange(6) % 2 == 1, "ddim")
    two = folder / "router.safetensors"
    write_router(two, router, family="dit", slots=TWO_BLOCKS.slots, training={"made": "up"})
    dit, uvit = OFFICIAL / "dit-ddim20", OFFICIAL / "uvit-dpm20"
    digits = ASSETS / "routers" / "uvit-10-0.1-0.safetensors"
    return [
        Model("DiT, 2 blocks", folder / "two.json", folder / "two.safetensors", 4.0, {"router": two}),
        Model(
            "DiT, digits",
            DEMO / "model.json",
            DEMO / "model.safetensors",
            3.0,
            {"router": DEMO / "router.safetensors", "threshold": 0.2, "steps": 20},
        ),
        Model(
            "U-ViT, digits",
            ASSETS / "uvit" / "model.json",
            ASSETS / "uvit" / "model.safetensors",
            2.0,
            {"router": digits, "threshold": 0.1, "steps": 10},
        ),
        Model(
            "DiT, 28 blocks",
            dit / "case.json",
            dit / "model.pt",
            4.0,
            {"router": dit / "router.pt", "threshold": 0.1},
        ),
        Model(
            "U-ViT, 28 blocks",
            folder / "uvit.json",
            uvit / "model.pth",
            1.4,
            {"router": uvit / "router.pth"},
        ),
    ]


def measure(
    models: Sequence[Model], precision: str, seeds: int, folder: Path
) -> Iterator[tuple[str, str, Report]]:
    """Verify bundles of every model; yields precision and weights, the model's name, and the report."""
    for model in models:
        options = ScheduleOptions(model_config=model.config, precision=precision, **model.schedule)
        plan = plan_from_options(options)
        weights = open_checkpoint(model.checkpoint, plan.config)
        request = Request(plan, weights, batch=(2, 2), guidance_scale=model.scale)
        if plan.precision.calibrated:
            plain = plan_from_options(replace(options, precision="float32"))
            made = build_bundle(folder / "float32" / model.name, replace(request, plan=plain))
            request = replace(request, calibration=calibrate(made, CALIBRATION, 0))
        bundle = build_bundle(folder / precision / model.name, request)
        runner = Runner.load(bundle.path, threads=1)
        for checkpoint in (None, model.checkpoint):
            name = f"{precision}, checkpoint" if checkpoint else precision
            for seed in range(seeds):
                settings = Settings(seed=seed, tolerance=ANY, checkpoint=checkpoint)
                report = verify(runner, settings, threads=1)
                yield name, model.name, report
                if report.unrounded and checkpoint is None:
                    yield f"{precision}, unrounded", model.name, report.unrounded


def worst_errors(report: Report) -> dict[str, float]:
    """By part; what is not finite is the worst."""
    calls = [*report.cached, *report.uncached]
    found = {
        "slots": [error for call in calls for error in call.slots.values()],
        "output": [call.output for call in calls],
        "latent": [call.latent for call in calls],
    }
    return {part: max(errors, key=rank, default=0.0) for part, errors in found.items()}


def allowed(name: str) -> Tolerance:
    """The tolerance for the name of a measurement."""
    precision, _, kind = name.partition(", ")
    if kind == "unrounded":
        return TOLERANCES[precision_of(precision).slots]
    return (ROUNDED if kind and precision in ROUNDED else TOLERANCES)[precision]


def compare(measured: Sequence[tuple[str, str, Report]]) -> list[Line]:
    """A line for each precision and part."""
    lines = []
    for name in dict.fromkeys(name for name, *_ in measured):
        mine = [(model, worst_errors(report)) for found, model, report in measured if found == name]
        for part in PARTS:
            model, errors = max(mine, key=lambda each: rank(each[1][part]))
            lines.append(Line(name, part, errors[part], model, getattr(allowed(name), part)))
    return lines


def table(lines: Sequence[Line]) -> str:
    """The lines as Markdown."""
    rows = ["| precision | of | worst error | in | allowed | times |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {line.precision} | {line.part} | {line.worst:.1e} | {line.model} | {line.allowed:g} | "
        f"{line.margin:.1f}{'' if line.sound else ' (!)'} |"
        for line in lines
    ]
    return "\n".join(rows)


def main() -> int:
    """Measure, print, and say whether every tolerance fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", action="append", choices=sorted(TOLERANCES), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of noise and classes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        models = make_models(Path(name))
        for precision in options.precision or TOLERANCES:
            found = compare(list(measure(models, precision, options.seeds, Path(name))))
            print(table(found), "", sep="\n", flush=True)
            lines += found
    return 0 if all(line.sound for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
