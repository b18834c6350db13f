"""``l2c-export engines``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l2c_export.cli.engine_options import ENGINE_BACKENDS, ENGINE_KEYS, check_typed, engine_options
from l2c_export.cli.options import FILE
from l2c_export.cli.profile_option import PROFILE, profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.core.bundle import Bundle, read_bundle
from l2c_export.core.engines import find_engines, unread_engines
from l2c_export.core.packed import find_packed
from l2c_export.engines.packed_report import (
    packed_json,
    packed_plan_json,
    packed_plan_text,
    packed_text,
)

if TYPE_CHECKING:
    from l2c_export.core.engines import EngineSet
    from l2c_export.core.profile import Profile
    from l2c_export.engines.build import EngineBuild
    from l2c_export.engines.request import EngineRequest

_log = logging.getLogger(__name__)


@click.command()
@click.argument("bundle", type=FILE)
@click.option(
    "--backend", type=click.Choice([*ENGINE_BACKENDS, "ort"]), default="rtx", show_default=True
)
@engine_options
@profile_option("backend", *ENGINE_KEYS)
@click.option("--dry-run", is_flag=True, help="Show what would be built and its price.")
@click.option("--report", is_flag=True, help="Show the engines that BUNDLE has, and build nothing.")
@click.option(
    "--networks",
    type=FILE,
    metavar="DIR",
    help="Write the networks of the engines, with inputs for Polygraphy, and build nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    backend: str,
    engines: Callable[[str], EngineRequest],
    dry_run: bool,
    report: bool,
    networks: Path | None,
    as_json: bool,
) -> None:
    """Build engines for BUNDLE: for its step graphs or sub-layers, the conditioning and the sampler.

    With --backend ort, pack the weights of an int8 BUNDLE for this CPU: the runner then finds them.
    """
    if dry_run + report + (networks is not None) > 1:
        raise click.UsageError("give one of --dry-run, --report and --networks")
    opened = read_bundle(bundle)
    _compare(opened, ctx.meta.get(PROFILE))
    if report:
        _show_engines(opened, as_json)
        return
    if networks is not None:
        show_networks(opened, engines(backend), networks, as_json)
        return
    if backend == "ort":
        _pack(opened, engines(backend), dry_run, as_json)
        return
    check_typed(str(bundle), opened.manifest.precision, backend)
    build = plan_engines(opened, engines(backend), shown=not as_json or dry_run, as_json=as_json)
    if dry_run:
        return
    made = run_build(build, shown=not as_json)
    if as_json:
        from l2c_export.engines.report import engines_json

        click.echo(json.dumps(engines_json(opened, made)))


def _compare(bundle: Bundle, profile: Profile | None) -> None:
    """Warn where a profile asks for another bundle: engines are of the bundle that there is."""
    if profile is None:
        return
    low, high = bundle.manifest.batch
    has = {
        "precision": bundle.manifest.precision,
        "batch": str(low) if low == high else f"{low}-{high}",
    }
    for what, value in has.items():
        if (wanted := getattr(profile, what)) != value:
            _log.warning(
                "%s has %s %s, the profile asks for %s: build the bundle with --%s %s to follow it",
                *(bundle.path, what, value, wanted, what, wanted),
            )


def _show_engines(bundle: Bundle, as_json: bool) -> None:
    from l2c_export.engines.report import engines_json, engines_text

    found = [made for _, made in find_engines(bundle)]
    unread, packed = unread_engines(bundle), find_packed(bundle)
    if as_json:
        other = [{"folder": folder.name, "error": str(error)} for folder, error in unread]
        other += [packed_json(each) for each in packed]
        click.echo(json.dumps(engines_json(bundle, found) + other))
    else:
        text = [engines_text(bundle, made) for made in found]
        text += [f"{folder.name}: {error}" for folder, error in unread]
        text += [packed_text(each) for each in packed]
        click.echo("\n\n".join(text) or f"{bundle.path} has no engines")


def _pack(bundle: Bundle, request: EngineRequest, dry_run: bool, as_json: bool) -> None:
    """Pack weights for this CPU, after showing what that will cost."""
    from l2c_export.engines.packed import PackedBuild

    if request != type(request)(request.backend):
        raise click.UsageError(
            "--backend ort packs weights for this CPU and takes no options of engines"
        )
    build = PackedBuild(bundle)
    if not as_json:
        click.echo(packed_plan_text(build))
    elif dry_run:
        click.echo(json.dumps(packed_plan_json(build)))
    if dry_run:
        return
    with show_progress(not as_json, keep=True) as progress:
        made = build.run(progress)
    click.echo(json.dumps([packed_json(made)]) if as_json else packed_text(made))


def plan_engines(
    bundle: Bundle, request: EngineRequest, *, shown: bool, as_json: bool = False
) -> EngineBuild:
    """Check a request, and show what it would build and the price."""
    from l2c_export.engines.build import EngineBuild
    from l2c_export.engines.report import plan_json, plan_text

    build = EngineBuild(bundle, request)
    if shown:
        click.echo(json.dumps(plan_json(build)) if as_json else plan_text(build))
    return build


def show_networks(bundle: Bundle, request: EngineRequest, folder: Path, as_json: bool) -> None:
    """Write the networks that engines are built from, and say what can be done with them."""
    from l2c_export.engines.build import EngineBuild
    from l2c_export.evidence.networks import SCRIPT, write_networks

    functions = write_networks(EngineBuild(bundle, request), folder)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "inputs": functions}))
        return
    fed = sum(map(bool, functions.values()))
    click.echo(f"{len(functions)} networks in {folder}, {fed} of them with the inputs of a call")
    name = bundle.manifest.calls[0].graph
    run = f"polygraphy run {folder / name}.onnx --onnxrt"
    if functions[name]:
        run += f" --data-loader-script {folder / SCRIPT}:{functions[name]}"
    click.echo(f"next, for example: {run}")


def run_build(build: EngineBuild, *, shown: bool) -> tuple[EngineSet, ...]:
    """Build, with a clock, and show what was built."""
    from l2c_export.engines.report import engines_text

    with show_progress(shown, keep=True) as progress:
        made = build.run(progress)
    if shown:
        click.echo("\n\n".join(engines_text(build.bundle, each) for each in made))
    return made
