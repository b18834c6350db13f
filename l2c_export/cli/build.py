"""``l2c-export build``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from l2c_export.build.build_options import (
    calibration_from_options,
    default_folder,
    request_from_options,
    weights_from_options,
)
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli.engine_options import (
    ENGINE_BACKENDS,
    ENGINE_KEYS,
    check_typed,
    engine_options,
)
from l2c_export.cli.engines import plan_engines, run_build
from l2c_export.cli.options import FILE, calibration_option, schedule_options
from l2c_export.cli.profile_option import profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.core.bundle import WEIGHTS, Bundle
from l2c_export.core.plan_report import plan_json, plan_table

if TYPE_CHECKING:
    from l2c_export.core.plan import Plan
    from l2c_export.engines.forecast import Forecast
    from l2c_export.engines.request import EngineRequest


@click.command()
@schedule_options
@calibration_option
@click.option(
    "--checkpoint", type=FILE, help="A .pt, .safetensors or diffusers folder; default: official."
)
@click.option("--random-weights", type=click.IntRange(0), metavar="SEED", help="Weights from a seed.")
@click.option(
    "--guidance-scale",
    type=float,
    metavar="S",
    help="The scale where a run names none: uncond + S * (cond - uncond).  [default: 4.0; U-ViT 1.4, "
    "which its own code calls 0.4]",
)
@engine_options
@profile_option("backend", "batch", "calibration", "max_graphs", "precision", *ENGINE_KEYS)
@click.option("-o", "--output", type=FILE, help="The bundle's folder.  [default: MODEL-SAMPLER-STEPS]")
@click.option(
    "--backend",
    type=click.Choice(["ort", *ENGINE_BACKENDS]),
    default="ort",
    show_default=True,
    help="Also build the engines of one of the others, as l2c-export engines does.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, of engines too, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(
    options: ScheduleOptions,
    checkpoint: Path | None,
    random_weights: int | None,
    guidance_scale: float | None,
    output: Path | None,
    backend: str,
    engines: Callable[[str], EngineRequest],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a bundle: plan, export once, split, cut one graph for each distinct call."""
    if checkpoint is not None and random_weights is not None:
        raise click.UsageError("--checkpoint and --random-weights: give one of them")
    if guidance_scale is not None and not options.guidance:
        raise click.UsageError("--no-guidance leaves no use for --guidance-scale")
    if backend == "ort":
        _refuse_engine_options()
    plan = plan_from_options(options)
    check_typed("a bundle with --precision int8", plan.precision.name, backend)
    foreseen = _forecast(engines(backend), plan, options) if backend in ENGINE_BACKENDS else None
    if dry_run:
        calibration_from_options(options)  # refuses what the build would
        _show_plan(plan, options, foreseen, as_json)
        return
    start = time.monotonic()
    from l2c_export.build.build import build_bundle

    folder = output or default_folder(options, len(plan.calls))
    weights = weights_from_options(options, checkpoint, random_weights)
    if random_weights is not None:
        click.secho(
            "warning: random weights: for plans and benchmarks, not for pictures", fg="yellow", err=True
        )
    request = request_from_options(options, plan, weights, guidance_scale)
    with show_progress(not as_json, keep=True) as progress:
        bundle = build_bundle(folder, request, progress)
    facts = _facts(bundle, time.monotonic() - start)
    if not as_json:
        click.echo(_summary(facts))
    if backend in ENGINE_BACKENDS:
        made = run_build(plan_engines(bundle, engines(backend), shown=not as_json), shown=not as_json)
        facts["engines"] = [each.folder for each in made]
    if as_json:
        click.echo(json.dumps(facts))


def _refuse_engine_options() -> None:
    """What is typed would be ignored; what a profile says is for the engines that come later."""
    ctx = click.get_current_context()
    for name in (*ENGINE_KEYS, "weights"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} is for engines, and --backend ort builds none")


def _forecast(request: EngineRequest, plan: Plan, options: ScheduleOptions) -> Forecast:
    """What is refused of engines, rather now than after the build."""
    from l2c_export.engines.forecast import forecast

    return forecast(request, plan, options.batch)


def _show_plan(plan: Plan, options: ScheduleOptions, foreseen: Forecast | None, as_json: bool) -> None:
    if as_json:
        engines = {"engines": asdict(foreseen)} if foreseen else {}
        click.echo(json.dumps(plan_json(plan, options.batch[1]) | engines))
        return
    click.echo(plan_table(plan, options.batch[1]))
    if foreseen:
        from l2c_export.engines.forecast import forecast_text

        click.echo(forecast_text(foreseen))


def _facts(bundle: Bundle, seconds: float) -> dict[str, Any]:
    manifest = bundle.manifest
    total = sum(file.bytes for file in manifest.files.values())
    return {
        "bundle": str(bundle.path),
        "calls": len(manifest.calls),
        "step_graphs": len(manifest.step_graphs()),
        "removed": manifest.schedule.get("removed", 0),
        "bytes": total,
        "weight_bytes": manifest.files[WEIGHTS].bytes,
        "seconds": round(seconds, 2),
    }


def _summary(facts: dict[str, Any]) -> str:
    weights = facts["weight_bytes"]
    return (
        f"{facts['bundle']}: {facts['calls']} calls on {facts['step_graphs']} step graphs, "
        f"{facts['removed']} sub-layer evaluations removed; {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['bytes'] / weights:.3f} x the weights; {facts['seconds']:.1f} s\n"
        f"next: l2c-export verify {facts['bundle']}"
    )
