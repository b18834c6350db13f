"""The demo: a small DiT that was really trained, from its files to a picture, in a minute."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.core.files import replacing
from l2c_export.core.models import read_model_config
from l2c_export.core.plan_report import plan_table
from l2c_export.evidence.bench import bench
from l2c_export.evidence.images import check_pillow, image_grid
from l2c_export.evidence.verify import Settings, verify
from l2c_export.evidence.verify_report import report_json, report_table
from l2c_export.runtime import Runner

ASSETS = Path(__file__).resolve().parents[1] / "demo_assets"
_ROWS = 5  # of the ten digits
_BENCH_BATCH, _BENCH_REPEATS = 8, 7

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Settled:
    """What was chosen when the demo was trained: ``demo_assets/demo.json``."""

    steps: int
    threshold: float
    guidance_scale: float


def run_demo(
    output: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Plan, build, verify, sample and measure the demo model.

    Args:
        output: Folder for ``bundle/`` and ``digits.png``.
        seed: Of the noise of the picture.
        say: Takes what is worth reading, a paragraph at a time.
        progress: Told what is being built.

    Returns:
        The numbers: ``verify``, ``bench``, ``difference``, and the ``picture``'s path.

    Raises:
        VerificationError: The bundle is not what the reference computes.
    """
    from l2c_export.build.build import Request, build_bundle
    from l2c_export.build.checkpoint import open_checkpoint

    check_pillow()
    chosen = Settled(**json.loads((ASSETS / "demo.json").read_text(encoding="utf-8")))
    config = ASSETS / "model.json"
    plan = plan_from_options(
        ScheduleOptions(
            model_config=config,
            router=ASSETS / "router.safetensors",
            threshold=chosen.threshold,
            steps=chosen.steps,
        )
    )
    say(f"1. plan\n\n{plan_table(plan)}")
    weights = open_checkpoint(ASSETS / "model.safetensors", read_model_config(config))
    request = Request(
        plan, weights, batch=(1, 10 * _ROWS), guidance_scale=chosen.guidance_scale, preset="demo"
    )
    bundle = build_bundle(output / "bundle", request, progress)
    say(f"2. build\n\n{len(bundle.manifest.files)} files in {bundle.path}")
    runner = Runner.load(bundle.path)
    report = verify(runner, Settings(seed=seed))
    say(f"3. verify, against PyTorch with the same schedule\n\n{report_table(report)}")
    report.check()
    uncached, cached = sample_pair(runner, seed)
    picture = output / "digits.png"
    draw_pair(picture, uncached, cached, plan.costs.speedup)
    difference = float(np.abs(uncached.clip(-1, 1) - cached.clip(-1, 1)).mean() / 2)
    measured = bench(bundle.path, batch=_BENCH_BATCH, repeats=_BENCH_REPEATS, memory=False)
    say(f"4. sample and measure\n\n{_verdict(measured, difference, picture)}")
    return {
        "verify": report_json(report, runner),
        "bench": measured,
        "difference": difference,
        "picture": str(picture),
        "bundle": str(bundle.path),
    }


def sample_pair(runner: Runner, seed: int) -> tuple[Floats, Floats]:
    """(N, 1, S, S) uncached and cached images of the ten digits from the same noise."""
    labels = np.tile(np.arange(10), _ROWS)
    return (
        runner.sample(labels, seed=seed, cached=False),
        runner.sample(labels, seed=seed, cached=True),
    )


def draw_pair(path: Path, uncached: Floats, cached: Floats, speedup: float) -> None:
    """Draw both grids side by side, with captions."""
    from PIL import Image, ImageDraw, ImageFont

    captions = ["uncached: every call computes everything", f"cached: {speedup:.2f}x fewer MACs"]
    grids = [image_grid(images, columns=10, side=56) for images in (uncached, cached)]
    margin, head = 24, 44
    height, width = grids[0].shape[:2]
    sheet = Image.new("RGB", (2 * width + 3 * margin, height + head + margin), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(20)
    for i, (grid, caption) in enumerate(zip(grids, captions, strict=True)):
        left = margin + i * (width + margin)
        pen.text((left, 12), caption, fill="black", font=font)
        sheet.paste(Image.fromarray(grid), (left, head))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _verdict(measured: dict[str, Any], difference: float, picture: Path) -> str:
    speed = measured["speed"]
    ratio = speed["measured"]
    return (
        f"{ratio['median']:.2f}x faster than uncached (p10 {ratio['p10']:.2f}, p90 {ratio['p90']:.2f}; "
        f"{speed['ideal']:.2f}x by MACs), batch {_BENCH_BATCH}\n"
        f"on average caching moves a pixel by {100 * difference:.1f} % of the way from black to white\n"
        f"look at {picture}"
    )
