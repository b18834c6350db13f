"""``l2c-export inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.cli.options import FILE
from l2c_export.core.bundle import read_bundle
from l2c_export.evidence.bundle_report import bundle_json, bundle_table


@click.command()
@click.argument("bundle", type=FILE)
@click.option("--check/--no-check", default=True, help="Compare every file with its digest.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def command(bundle: Path, check: bool, as_json: bool) -> None:
    """Show what BUNDLE holds, and check that it is what was built."""
    opened = read_bundle(bundle)
    if check:
        opened.check_files()
    if as_json:
        click.echo(json.dumps(bundle_json(opened, check), ensure_ascii=False))
    else:
        click.echo(bundle_table(opened, check))
