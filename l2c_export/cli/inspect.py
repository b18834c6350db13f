"""``l2c-export inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from l2c_export.cli.options import FILE
from l2c_export.core.bundle import read_bundle
from l2c_export.core.engine_archive import unpack_plans
from l2c_export.core.engines import find_engines, unread_engines
from l2c_export.core.packed import find_packed
from l2c_export.core.plan_report import size
from l2c_export.engines.packed_report import packed_json, packed_text
from l2c_export.errors import UnsupportedError
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
    found, packings = find_engines(opened), find_packed(opened)
    unread = unread_engines(opened)
    if check:
        for _, error in unread:
            if not isinstance(error, UnsupportedError):  # another release's is as it was built
                raise error
        for folder, engines in found:
            for _ in unpack_plans(folder, engines):
                pass  # each is compared with its digest on the way
        for packed in packings:
            for name in packed.files:
                packed.check_file(opened, name)
    if as_json:
        held = {
            "engines": [asdict(engines) for _, engines in found],
            "unread_engines": {folder.name: str(error) for folder, error in unread},
            "packed": [packed_json(packed) for packed in packings],
        }
        click.echo(json.dumps(bundle_json(opened, check) | held, ensure_ascii=False))
    else:
        click.echo(bundle_table(opened, check))
        for _, engines in found:
            click.echo(
                f"\nengines   {engines.folder}: {len(engines.engines)} engines, "
                f"{size(engines.plan_bytes)} of plans in {size(engines.archive[1].bytes)}, "
                f"{size(engines.scratch)} of scratch (see: l2c-export engines {bundle} --report)"
            )
        for _, error in unread:
            click.echo(f"\nengines   {error}")
        for packed in packings:
            click.echo(f"\nengines   {packed_text(packed)}")
