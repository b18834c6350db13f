"""``l2c-export bench``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from l2c_export.cli.options import FILE, engines_option, write_report
from l2c_export.cli.profile_option import profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.evidence.against import against_table, bench_against
from l2c_export.evidence.bench import PEERS, bench
from l2c_export.evidence.bench_report import bench_table
from l2c_export.runtime.backends import BACKENDS


@click.command()
@click.argument("bundle", type=FILE)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Latents in one call."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@profile_option("backend", "threads")
@click.option("--threads", type=click.IntRange(1), help="For bundle and peer; without it, all cores.")
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="ort", show_default=True)
@engines_option
@click.option("--peer", type=click.Choice(PEERS), help="Also run eager PyTorch with the same schedule.")
@click.option(
    "--against", type=FILE, metavar="BUNDLE", help="Compare with another bundle of the model instead."
)
@click.option("--memory/--no-memory", default=True, help="Also measure memory. Default: yes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON alone.")
@click.option("--report", type=FILE, help="Where the report goes. Default: in BUNDLE/reports.")
def command(
    bundle: Path,
    batch: int,
    repeats: int,
    threads: int | None,
    backend: str,
    engines: str | None,
    peer: str | None,
    against: Path | None,
    memory: bool,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure BUNDLE: cached beside uncached, call by call, its ceiling, its memory."""
    if against is not None and peer is not None:
        raise click.UsageError("--against and --peer: give one of them")
    if against is not None:
        with show_progress() as progress:
            data = bench_against(
                bundle,
                against,
                batch=batch,
                repeats=repeats,
                threads=threads,
                backend=backend,
                engines=engines,
                progress=progress,
            )
        click.echo(json.dumps(data, ensure_ascii=False) if as_json else against_table(data))
        write_report(report, bundle / "reports" / "against.json", data)
        return
    with show_progress() as progress:
        data = bench(
            bundle,
            batch=batch,
            repeats=repeats,
            threads=threads,
            backend=backend,
            engines=engines,
            peer=peer,
            memory=memory,
            progress=progress,
        )
    click.echo(json.dumps(data, ensure_ascii=False) if as_json else bench_table(data))
    write_report(report, bundle / "reports" / "bench.json", data)
