"""``l2c-export doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from l2c_export.cli.options import FILE
from l2c_export.core.bundle import read_bundle
from l2c_export.errors import UnsupportedError


@click.command()
@click.argument("bundle", type=FILE, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.pass_context
def command(ctx: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Say what this machine can build and run, and what is missing; with BUNDLE, of its engines too.

    Exits with 4 if it can run nothing, or none of BUNDLE's engines.
    """
    from l2c_export.engines.doctor import diagnose, diagnosis_text

    diagnosis = diagnose(read_bundle(bundle) if bundle else None)
    healthy = {"healthy": diagnosis.healthy}
    click.echo(json.dumps(asdict(diagnosis) | healthy) if as_json else diagnosis_text(diagnosis))
    if not diagnosis.healthy:
        ctx.exit(UnsupportedError.exit_code)
