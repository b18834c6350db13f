"""``l2c-export demo``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.cli.options import FILE
from l2c_export.cli.progress import show_progress
from l2c_export.evidence.demo import run_demo


@click.command()
@click.option("-o", "--output", type=FILE, default="l2c-demo", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one line of JSON.")
def command(output: Path, seed: int, as_json: bool) -> None:
    """Build, verify, sample and measure a small model of handwritten digits that ships inside."""

    def say(text: str) -> None:
        if not as_json:
            click.echo(text + "\n")

    with show_progress() as progress:
        facts = run_demo(output, seed, say, progress)
    if as_json:
        click.echo(json.dumps(facts))
