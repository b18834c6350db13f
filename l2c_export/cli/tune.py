"""``l2c-export tune``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import click

from l2c_export.build.build_options import model_label
from l2c_export.build.schedule_options import ScheduleOptions
from l2c_export.cli.options import FILE, calibration_option, trajectory_options
from l2c_export.cli.profile_option import profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.evidence.tune_choice import Budget, check_budget


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Thresholds with commas or spaces between them: ``0.05,0.1``."""
    if value is None:
        return None
    try:
        numbers = tuple(float(word) for word in re.split(r"[,\s]+", value.strip()))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 <= number <= 1 for number in numbers):
        raise click.BadParameter(f"{value!r} is not a list of thresholds in 0 … 1 such as 0.05,0.1")
    return numbers


def _latency(ctx: click.Context, param: click.Parameter, value: str | None) -> Budget | None:
    """``0.7`` or ``70%`` of the uncached time; ``250ms`` or ``1.5s`` a latent."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9.eE+-]+?)\s*(%|ms|s)?", value.strip())
    unit = match[2] if match else None
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    number *= {"%": 0.01, "s": 1000.0}.get(unit or "", 1.0)
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{value!r} is neither a share such as 0.7 nor a time such as 250ms")
    if unit in (None, "%") and number > 1:
        raise click.BadParameter(f"{value!r} is more than the uncached time; did you mean % or ms?")
    return Budget("ms" if unit in ("ms", "s") else "share", number)


@click.command()
@trajectory_options
@calibration_option
@click.option(
    "--router",
    "routers",
    type=FILE,
    multiple=True,
    help="Router file; may be given again, for routers of different λ. Default: the released one.",
)
@click.option(
    "--checkpoint", type=FILE, help="A .pt, .safetensors or diffusers folder; default: official."
)
@click.option("--random-weights", type=click.IntRange(0), metavar="SEED", help="Weights from a seed.")
@click.option("--thresholds", callback=_numbers, metavar="θ,θ,…", help="Default: each router's own.")
@click.option(
    "--points",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="So many thresholds of a router's own, which remove evenly more.",
)
@click.option(
    "--latency-budget",
    callback=_latency,
    metavar="SHARE|TIME",
    help="Choose the nearest to uncached in 0.7 (or 70%) of its time, or in 250ms a latent.",
)
@click.option(
    "--drift-budget",
    type=click.FloatRange(0, min_open=True),
    help="Choose the fastest whose latents differ by at most this relative L2.",
)
@click.option("--guidance-scale", type=float, help="Default: the model's.")
@click.option(
    "--samples", type=click.IntRange(1), default=8, show_default=True, help="To average the drift over."
)
@click.option(
    "--repeats",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Timed trajectories of each schedule; 0 goes by the predicted time.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@profile_option("batch", "calibration", "max_graphs", "precision", "threads")
@click.option("--threads", type=click.IntRange(1), help="Without it, all cores.")
@click.option("-o", "--output", type=FILE, help="Folder.  [default: MODEL-tune]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def command(
    options: ScheduleOptions,
    latency_budget: Budget | None,
    drift_budget: float | None,
    output: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare routers and thresholds by time and drift; choose one for a budget.

    OUTPUT gets tune.json, tune.png and work/, where everything that was measured is kept: a run that
    was interrupted goes on, and another budget or more samples measure only what is lacking.
    """
    if latency_budget is not None and drift_budget is not None:
        raise click.UsageError("--latency-budget and --drift-budget: give one of them")
    if values["checkpoint"] is not None and values["random_weights"] is not None:
        raise click.UsageError("--checkpoint and --random-weights: give one of them")
    if values["guidance_scale"] is not None and not options.guidance:
        raise click.UsageError("--no-guidance leaves no use for --guidance-scale")
    from l2c_export.evidence.tune import TuneOptions, tune
    from l2c_export.evidence.tune_report import tune_table

    budget = latency_budget or (Budget("drift", drift_budget) if drift_budget is not None else None)
    folder = output or Path(f"{model_label(options)}-tune")
    with show_progress(not as_json, keep=True) as progress:
        data = tune(TuneOptions(options, budget=budget, **values), folder, progress)
    click.echo(json.dumps(data, ensure_ascii=False) if as_json else tune_table(data))
    check_budget(data)
