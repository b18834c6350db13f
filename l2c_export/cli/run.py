"""``l2c-export run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from l2c_export.cli.options import FILE, engines_option, parse_labels, schedule_option
from l2c_export.cli.profile_option import profile_option
from l2c_export.cli.progress import show_progress
from l2c_export.core.bundle import read_bundle
from l2c_export.evidence.images import IMAGE_CHANNELS
from l2c_export.evidence.samples import SampleOptions, latent_note, sample_to_files
from l2c_export.runtime.backends import BACKENDS


@click.command()
@click.argument("bundle", type=FILE)
@click.option("--labels", callback=parse_labels, help="Classes, one an image: 207,360. Default: some.")
@click.option("--seed", type=click.IntRange(0), help="For all noise, that of calls too.  [default: 0]")
@click.option("--noise", type=FILE, help="A .npy file of (images, C, H, W) float32 to start from.")
@click.option("--guidance-scale", type=float, help="Default: the bundle's own.")
@click.option("--cached/--uncached", default=True, help="Uncached computes everything in every call.")
@schedule_option
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="ort", show_default=True)
@engines_option
@profile_option("backend", "threads")
@click.option("--threads", type=click.IntRange(1), help="For each call. Default: the backend's choice.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    default="samples.npz",
    show_default=True,
    help="A .npz file of latents, labels, noise and facts; a .npy of the latents alone; or a .png, "
    "where the model makes images. A .npz then gets its .png beside it, if Pillow is installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one line of JSON.")
def command(bundle: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Sample latents or images from BUNDLE."""
    if options["schedule"] and not options["cached"]:
        raise click.UsageError("--uncached computes everything in every call, and takes no --schedule")
    manifest = read_bundle(bundle).manifest
    if options["noise"] and options["seed"] is not None and not manifest.stochastic:
        raise click.UsageError("--noise and --seed: the seed is only for making noise")
    if manifest.random_weights:
        click.secho("warning: the weights are random, and so are the results", fg="yellow", err=True)
    with show_progress(not as_json) as progress:
        facts = sample_to_files(
            bundle,
            SampleOptions(**options),
            output,
            lambda done, total: progress("sampling: call", done, total),
        )
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    click.echo(_summary(facts))
    if manifest.latent[0] not in IMAGE_CHANNELS:
        click.echo(f"note: {latent_note(manifest)}")


def _summary(facts: dict[str, Any]) -> str:
    images, many = facts["images"], facts["trajectories"]
    return "\n".join(
        [
            f"{images} image{'s' * (images > 1)}, {'cached' if facts['cached'] else 'uncached'}, in "
            f"{many} trajector{'ies' if many > 1 else 'y'} of {facts['calls']} calls: "
            f"{facts['seconds_per_trajectory']:.2f} s a trajectory, loaded in "
            f"{facts['load_seconds']:.2f} s ({facts['backend']})",
            *facts["outputs"],
        ]
    )
