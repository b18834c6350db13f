"""``l2c-export calibrate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.cli.options import FILE
from l2c_export.cli.progress import show_progress
from l2c_export.core.bundle import read_bundle
from l2c_export.core.calibration import Calibration, write_calibration


@click.command()
@click.argument("bundle", type=FILE)
@click.option("-o", "--output", type=FILE, default="calibration.json", show_default=True)
@click.option(
    "--samples", type=click.IntRange(1), default=8, show_default=True, help="Trajectories to watch."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(bundle: Path, output: Path, samples: int, seed: int, as_json: bool) -> None:
    """Find the ranges that build --precision int8-static wants, from trajectories of BUNDLE.

    PyTorch samples them with BUNDLE's model, weights, sampler and guidance. Nothing is cached, so one
    file serves every router, threshold and schedule.
    """
    from l2c_export.evidence.calibrate import calibrate

    with show_progress(not as_json) as progress:
        made = calibrate(read_bundle(bundle), samples, seed, progress)
    write_calibration(output, made)
    if as_json:
        click.echo(json.dumps({"calibration": str(output), "layers": len(made.layers), **made.source}))
    else:
        click.echo(_summary(output, made))


def _summary(output: Path, made: Calibration) -> str:
    layers, many = made.layers, made.samples > 1
    widest = max(layers, key=lambda name: max(layers[name]))
    return (
        f"{output}: {len(layers)} layers, {made.samples} "
        f"trajector{'ies' if many else 'y'} of {made.calls} calls; "
        f"the largest input is {max(layers[widest]):g}, of {widest}\n"
        f"next: l2c-export build --precision int8-static --calibration {output} …"
    )
