"""``l2c-export verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.cli.options import (
    FILE,
    engines_option,
    parse_labels,
    schedule_option,
    write_report,
)
from l2c_export.cli.profile_option import profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.evidence.schedule_file import load_runner
from l2c_export.evidence.verify import Settings, verify
from l2c_export.evidence.verify_report import report_json, report_table
from l2c_export.runtime.backends import BACKENDS


@click.command()
@click.argument("bundle", type=FILE)
@click.option("--labels", callback=parse_labels, metavar="L,L,…", help="Classes; without it, random.")
@click.option(
    "--batch", type=click.IntRange(1), help="Latents, without --labels. Default: 2 if it can."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--guidance-scale", type=float, help="Without it, the bundle's own.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    help="Largest error of any kind. Default: the precision's own, 1e-4 for float32. int8's run "
    "without rounding keeps its own.",
)
@click.option("--calls", type=click.IntRange(1), help="Compare only the first so many calls.")
@click.option(
    "--checkpoint", type=FILE, help="Weights for the reference; without it, the bundle's own file."
)
@click.option(
    "--uncached/--no-uncached", default=True, help="Also compare without caching. Default: yes."
)
@schedule_option
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="ort", show_default=True)
@engines_option
@profile_option("backend", "threads")
@click.option("--threads", type=click.IntRange(1), help="For the bundle; without it, all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
@click.option("--report", type=FILE, help="Where the report goes. Default: BUNDLE/reports/verify.json.")
def command(
    bundle: Path,
    backend: str,
    engines: str | None,
    threads: int | None,
    schedule: Path | None,
    as_json: bool,
    report: Path | None,
    **settings: object,
) -> None:
    """Compare BUNDLE, call by call, with PyTorch and the same schedule; exit 3 where it differs.

    The schedule is the bundle's own, unless --schedule is given: what each call reuses is what its
    manifest reads, and no router is read again. Timesteps and updates are the sampler's, computed anew,
    and not the manifest's; the weights are the bundle's, or with --checkpoint those of that file.
    """
    runner = load_runner(bundle, backend, threads, engines, schedule)
    with show_progress() as progress:
        result = verify(runner, Settings(**settings), progress, threads=threads)  # type: ignore[arg-type]
    data = report_json(result, runner)
    click.echo(json.dumps(data, ensure_ascii=False) if as_json else report_table(result))
    write_report(report, bundle / "reports" / "verify.json", data)
    result.check()
