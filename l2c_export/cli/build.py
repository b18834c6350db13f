"""``l2c-export build``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli.options import FILE, schedule_options
from l2c_export.cli.profile_option import profile_option
from l2c_export.core.bundle import WEIGHTS, Bundle
from l2c_export.core.plan_report import plan_json, plan_table
from l2c_export.errors import L2CError

if TYPE_CHECKING:
    from l2c_export.build.checkpoint import Checkpoint


@click.command()
@schedule_options
@click.option(
    "--checkpoint", type=FILE, help="A .pt, .safetensors or diffusers folder; default: official."
)
@click.option("--random-weights", type=click.IntRange(0), metavar="SEED", help="Weights from a seed.")
@click.option("--guidance-scale", type=float, help="The scale where a run names none.  [default: 4.0]")
@profile_option("backend", "batch", "max_graphs")
@click.option("-o", "--output", type=FILE, help="The bundle's folder.  [default: MODEL-SAMPLER-STEPS]")
@click.option("--backend", type=click.Choice(["ort"]), default="ort", show_default=True)
@click.option("--dry-run", is_flag=True, help="Show the plan and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(
    options: ScheduleOptions,
    checkpoint: Path | None,
    random_weights: int | None,
    guidance_scale: float | None,
    output: Path | None,
    backend: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a bundle: plan, export once, split, cut one graph for each distinct call."""
    if checkpoint is not None and random_weights is not None:
        raise click.UsageError("--checkpoint and --random-weights: give one of them")
    if guidance_scale is not None and not options.guidance:
        raise click.UsageError("--no-guidance leaves no use for --guidance-scale")
    plan = plan_from_options(options)
    if dry_run:
        batch = options.batch[1]
        click.echo(json.dumps(plan_json(plan, batch)) if as_json else plan_table(plan, batch))
        return
    start = time.monotonic()
    from l2c_export.build.build import Request, build_bundle

    name = options.model or (options.model_config.stem if options.model_config else "model")
    folder = output or Path(f"{name}-{options.sampler}-{len(plan.calls)}")
    weights = _weights(options, checkpoint, random_weights)
    if random_weights is not None:
        click.secho(
            "warning: random weights: for plans and benchmarks, not for pictures", fg="yellow", err=True
        )
    plan = replace(plan, config=weights.config)  # a diffusers folder has constants of its own
    scale = 4.0 if guidance_scale is None else guidance_scale  # the official sample.py's
    request = Request(plan, weights, options.sampler, options.batch, scale, options.model)
    with _progress(shown=not as_json) as progress:
        bundle = build_bundle(folder, request, progress)
    facts = _facts(bundle, time.monotonic() - start)
    click.echo(json.dumps(facts) if as_json else _summary(facts))


def _weights(options: ScheduleOptions, checkpoint: Path | None, seed: int | None) -> Checkpoint:
    from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
    from l2c_export.build.download import find_checkpoint

    if seed is not None:
        return random_checkpoint(options.config, seed)
    if checkpoint is None:
        if options.model is None:
            raise L2CError("give the weights: --checkpoint FILE, or --random-weights SEED")
        checkpoint = find_checkpoint(options.model)
    return open_checkpoint(checkpoint, options.config)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal a line that moves; elsewhere a line when something is done."""
    terminal, start = sys.stderr.isatty(), time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        seconds = time.monotonic() - start
        if terminal and shown:
            click.echo(f"\r\033[K{seconds:6.1f} s  {what}  {100 * done // total} %", nl=False, err=True)
        if shown and done == total:
            click.echo(("\r\033[K" if terminal else "") + f"{seconds:6.1f} s  {what} done", err=True)

    yield progress


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
