"""Options that several commands share."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from l2c_export.build.schedule_options import ScheduleOptions
from l2c_export.core.files import write_json
from l2c_export.core.models import PRESETS
from l2c_export.core.precision import PRECISIONS
from l2c_export.core.samplers import SAMPLERS
from l2c_export.errors import L2CError
from l2c_export.runtime.backends import BACKENDS

FILE = click.Path(path_type=Path)
"""A path; whether the file is there and readable is said by whoever reads it."""

_LARGEST_BATCH = 4096

_log = logging.getLogger(__name__)

schedule_option = click.option(
    "--schedule",
    type=FILE,
    help="Another schedule: a .npy file of (calls, slots) bool, True where reused. Needs engines of "
    "--per sublayer.",
)


def parse_batch(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """``4`` is a fixed batch, ``1-8`` a range; return (smallest, largest)."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", value)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= _LARGEST_BATCH:
        raise click.BadParameter(f"{value!r} is not N or LO-HI with 1 <= LO <= HI <= {_LARGEST_BATCH}")
    return low, high


def parse_labels(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Class labels with commas or spaces between them: ``207,360``."""
    if value is None:
        return None
    words = re.split(r"[,\s]+", value.strip())
    if not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of class labels such as 207,360")
    return tuple(map(int, words))


_MODEL_OPTIONS = (
    click.option("--model", metavar="NAME", help="A known model: dit-xl-2, dit-b-4-512, uvit-h-2 …"),
    click.option(
        "--model-config", type=FILE, help="A model's configuration: a JSON file, or a diffusers folder."
    ),
)

_CACHING_OPTIONS = (
    click.option("--router", type=FILE, help="Router file; without it, the model's released one."),
    click.option(
        "--threshold",
        type=float,
        help="Compute a sub-layer where the router's score is above it.  [default: 0.1; U-ViT 0.9]",
    ),
    click.option("--uncached", is_flag=True, help="Compute everything; needs no router."),
    click.option(
        "--policy",
        metavar="fora:N|random:SEED",
        help="A schedule to compare with: compute every Nth call (FORA), or shuffle the router's.",
    ),
)

_TRAJECTORY_OPTIONS = (
    click.option(
        "--sampler",
        help=f"One of: {', '.join(SAMPLERS)}.  [default: ddim; U-ViT dpm-solver-2s]",
    ),
    click.option(
        "--steps", type=click.IntRange(1), help="Calls of a trajectory; the router's own, or 20."
    ),
    click.option(
        "--batch",
        metavar="N|LO-HI",
        callback=parse_batch,
        default="1",
        show_default=True,
        help="Latents in one call.",
    ),
    click.option(
        "--guidance/--no-guidance", default=True, help="Classifier-free guidance. Default: on."
    ),
    click.option(
        "--max-graphs",
        type=click.IntRange(1),
        help="Merge down to at most so many step graphs, by computing more.",
    ),
    click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        metavar="NAME",
        default="float32",
        show_default=True,
        help=f"Of the blocks' linear layers: {', '.join(PRECISIONS)}. The rest is float32.",
    ),
)


calibration_option = click.option(
    "--calibration",
    type=FILE,
    help="What l2c-export calibrate wrote, for --precision int8-static.",
)
"""Becomes one of the packed options."""

_Command = Callable[..., Any]


def schedule_options(command: _Command) -> _Command:
    """Add the options of ``plan`` and ``build``; the command gets them as ``options``."""
    return _with_options(command, (*_MODEL_OPTIONS, *_CACHING_OPTIONS, *_TRAJECTORY_OPTIONS))


def trajectory_options(command: _Command) -> _Command:
    """Add those that say nothing of what is cached; the command gets them as ``options``."""
    return _with_options(command, (*_MODEL_OPTIONS, *_TRAJECTORY_OPTIONS))


def _with_options(command: _Command, options: tuple[Callable[[_Command], _Command], ...]) -> _Command:
    @functools.wraps(command)
    def packed(**values: Any) -> Any:
        names = [field.name for field in fields(ScheduleOptions) if field.name in values]
        given = {name: values.pop(name) for name in names}
        checkpoint = values.get("checkpoint")
        if given["model"] is None and given["model_config"] is None and checkpoint is not None:
            given["model_config"] = (
                checkpoint if checkpoint.is_dir() else None
            )  # diffusers: has its own
        chosen = ScheduleOptions(**given)
        _check_usage(chosen)
        return command(options=chosen, **values)

    decorated: _Command = packed
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def _check_usage(options: ScheduleOptions) -> None:
    if (options.model is None) == (options.model_config is None):
        raise click.UsageError("give one of --model NAME and --model-config FILE")
    if options.uncached and options.router is not None:
        raise click.UsageError("--uncached computes everything: it takes no --router")
    if options.uncached and options.policy is not None:
        raise click.UsageError("--uncached computes everything: it takes no --policy")
    if options.router is not None and (options.policy or "").startswith("fora"):
        raise click.UsageError(f"--policy {options.policy} needs no router: leave --router out")
    if options.model is not None and options.model not in PRESETS:
        known = ", ".join(PRESETS)
        raise click.BadParameter(f"{options.model!r} is not one of: {known}", param_hint="--model")


def engines_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--engines`` to a command that has ``--backend``, for those that run engines."""

    @functools.wraps(command)
    def checked(**values: Any) -> Any:
        if values["engines"] is not None and values["backend"] == "ort":
            has = ", ".join(name for name in BACKENDS if name != "ort")
            raise click.UsageError(f"--engines needs a --backend that runs engines: one of {has}")
        return command(**values)

    return click.option(
        "--engines",
        metavar="NAME",
        help="Which folder of the bundle's engines. Default: the best that fits.",
    )(checked)


def write_report(path: Path | None, default: Path, data: Any) -> None:
    """Write a JSON report whole; where nobody asked for it and it cannot be written, only warn.

    Args:
        path: Where the user wants it.
        default: Where it goes otherwise, in the bundle.
        data: The report.

    Raises:
        L2CError: It cannot be written where the user wants it.
    """
    try:
        write_json(path or default, data)
    except OSError as error:
        said = (
            f"cannot write the report {path or default}: {error.strerror}; "
            "choose another place with --report"
        )
        if path is not None:
            raise L2CError(said) from None
        _log.warning(said)
