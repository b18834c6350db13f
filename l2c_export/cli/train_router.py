"""``l2c-export train-router``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from l2c_export.cli.options import FILE
from l2c_export.cli.progress import show_progress
from l2c_export.core.models import ModelConfig, preset, read_model_config
from l2c_export.core.samplers import SAMPLERS
from l2c_export.train.recipe import (
    DEFAULTS,
    LATENT_SCALE,
    WITHOUT_DATA,
    Recipe,
    make_recipe,
)
from l2c_export.train.shape import SCHEDULES


def _by_family(field: str) -> str:
    """Defaults of the model families, for a help text."""
    values = {family: recipe[field] for family, recipe in DEFAULTS.items()}
    return ", ".join(f"{'none' if v is None else v} for {family}" for family, v in values.items())


@click.command()
@click.option("--model", metavar="NAME", help="A known model: dit-xl-2, dit-b-4-512 …")
@click.option("--model-config", type=FILE, help="A JSON file with a model's configuration.")
@click.option(
    "--checkpoint", type=FILE, help="A .pt, .safetensors or diffusers folder; default: official."
)
@click.option(
    "--data",
    type=FILE,
    help="An .npz with labels and latents or images, or a folder with one sub-folder a class, of "
    ".npy latents or PNG and JPEG images.",
)
@click.option("--no-data", is_flag=True, help="Train from noise, on the student's own trajectories.")
@click.option(
    "--latent-scale",
    type=float,
    help=f"Factor of latents.  [default: {LATENT_SCALE} with --model, else 1]",
)
@click.option("--sampler", help=f"One of: {', '.join(SAMPLERS)}; default: the model family's.")
@click.option("--steps", type=int, default=20, show_default=True, help="Calls of a trajectory.")
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    default="pairs",
    show_default=True,
    help="Route one call of each pair or solver step, or every call but the first (with --no-data).",
)
@click.option(
    "--iterations",
    type=int,
    help=f"Optimizer steps.  [default: {_by_family('iterations')}; without data, a trajectory each, "
    f"{WITHOUT_DATA['iterations']}]",
)
@click.option("--batch", type=int, default=64, show_default=True, help="Latents, over all processes.")
@click.option(
    "--lr",
    type=float,
    help=f"Learning rate, constant.  [default: {Recipe.lr}; without data {WITHOUT_DATA['lr']}]",
)
@click.option(
    "--l1",
    "--lambda",
    type=float,
    help=f"Weight of the sum of scores; more removes more.  [default: {_by_family('l1')}]",
)
@click.option(
    "--error",
    type=click.Choice(["mean", "sum"]),
    help=f"Of a latent's squared errors.  [default: {_by_family('error')}]",
)
@click.option("--ste-threshold", type=float, help="Train with hard decisions at this score.")
@click.option(
    "--label-dropout", type=float, help=f"To the null label.  [default: {Recipe.label_dropout}]"
)
@click.option(
    "--guidance-scale",
    type=float,
    help="Of trajectories without data.  [default: that of the model's family]",
)
@click.option(
    "--reweigh-every",
    type=int,
    metavar="N",
    help="Without data: weigh calls by what caching there does to the final latent, anew every N.",
)
@click.option(
    "--clamp",
    type=float,
    help=f"Largest absolute logit.  [default: {_by_family('clamp')}; without data "
    f"{WITHOUT_DATA['clamp']}]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
@click.option("--threads", type=click.IntRange(1), help="On the CPU. Default: PyTorch's choice.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint beside the output.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    help="Iterations between checkpoints.  [default: 1000; without data 50]",
)
@click.option("--compare", type=FILE, help="Another router: also print how much they agree.")
@click.option("-o", "--output", type=FILE, default="router.safetensors", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(model: str | None, model_config: Path | None, as_json: bool, **values: Any) -> None:
    """Train a Learning-to-Cache router for a model and its sampler.

    The training's own checkpoint is OUTPUT.training; one that is there is continued with --resume, and
    never overwritten by another training. On several GPUs: torchrun --nproc-per-node 8
    --no-python l2c-export train-router …
    """
    config = _config(model, model_config)
    recipe = make_recipe(config, **{field.name: values.pop(field.name) for field in fields(Recipe)})
    from l2c_export.train.job import Job, train_router
    from l2c_export.train.sweep import sweep_table

    with show_progress(not as_json) as progress:
        result = train_router(
            Job(config, recipe, preset=model, **values),
            lambda done, total, loss: progress(f"training, loss {loss:.3g}:", done, total),
        )
    if result is None:  # another process of the same training reports
        return
    if as_json:
        click.echo(json.dumps(result.facts()))
        return
    click.echo(sweep_table(result.sweep))
    ends = "" if result.losses is None else "  loss {:.3g} -> {:.3g}".format(*result.losses)
    click.echo(f"{result.output}  {result.iterations} iterations in {result.seconds:.0f} s{ends}")


def _config(model: str | None, model_config: Path | None) -> ModelConfig:
    if model is not None and model_config is None:
        return preset(model)
    if model_config is not None and model is None:
        return read_model_config(model_config)
    raise click.UsageError("give one of --model NAME and --model-config FILE")
