"""``l2c-export plan``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.build.plan_picture import draw_plan
from l2c_export.build.schedule_options import ScheduleOptions, plan_from_options
from l2c_export.cli.options import FILE, schedule_options
from l2c_export.cli.profile_option import profile_option
from l2c_export.core.plan_report import plan_json, plan_table


@click.command()
@schedule_options
@profile_option("batch", "max_graphs", "precision")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one line of JSON.")
@click.option("--picture", type=FILE, help="Also draw calls x sub-layers into a PNG file.")
def command(options: ScheduleOptions, as_json: bool, picture: Path | None) -> None:
    """Show what a schedule computes, shares and costs, before anything is built."""
    plan = plan_from_options(options)
    batch = options.batch[1]
    if picture is not None:
        draw_plan(plan, picture)
    if as_json:
        click.echo(json.dumps(plan_json(plan, batch), ensure_ascii=False))
    else:
        click.echo(plan_table(plan, batch))
    if picture is not None:
        click.echo(f"\npicture: {picture}", err=True)
