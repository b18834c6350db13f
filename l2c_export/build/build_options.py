"""From what a user asks for to a build: the weights, the guidance scale, the bundle's folder."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2c_export.build.schedule_options import ScheduleOptions
from l2c_export.core.calibration import Calibration, read_calibration
from l2c_export.core.plan import Plan
from l2c_export.core.precision import precision_of
from l2c_export.errors import L2CError

if TYPE_CHECKING:
    from l2c_export.build.build import Request
    from l2c_export.build.checkpoint import Checkpoint

_log = logging.getLogger(__name__)


def weights_from_options(
    options: ScheduleOptions, checkpoint: Path | None, seed: int | None
) -> Checkpoint:
    """Open or make the weights of the options' model.

    Args:
        options: Name the model.
        checkpoint: A file or a diffusers folder; None takes the official one of the preset.
        seed: Of random weights, instead of a checkpoint.

    Raises:
        L2CError: There are none, or they do not fit the model.
    """
    from l2c_export.build.checkpoint import open_checkpoint, random_checkpoint
    from l2c_export.build.download import find_checkpoint

    calibration_from_options(options)  # its faults rather now than after a download
    if seed is not None:
        return random_checkpoint(options.config, seed)
    if checkpoint is None:
        if options.model is None:
            raise L2CError("give the weights: --checkpoint FILE, or --random-weights SEED")
        checkpoint = find_checkpoint(options.model)
    return open_checkpoint(checkpoint, options.config)


def request_from_options(
    options: ScheduleOptions, plan: Plan, weights: Checkpoint, guidance_scale: float | None
) -> Request:
    """What to build of a plan that was made from the same options.

    A calibration of another sampler's trajectories is taken with a warning.

    Raises:
        L2CError: The options' calibration is not of these weights.
    """
    from l2c_export.build.build import Request
    from l2c_export.build.calibration import check_calibration

    plan = replace(plan, config=weights.config)  # a diffusers folder has constants of its own
    calibration = calibration_from_options(options)
    if calibration is not None:
        check_calibration(calibration, f"calibration {options.calibration}", weights)
        if calibration.sampler != options.sampler_name:
            _log.warning(
                "calibration %s was made with sampler %s, and this build is for %s: ranges of its "
                "trajectories may not fit; calibrate a bundle of this sampler to be sure",
                options.calibration,
                calibration.sampler,
                options.sampler_name,
            )
    return Request(plan, weights, options.batch, guidance_scale, options.model, calibration=calibration)


def calibration_from_options(options: ScheduleOptions) -> Calibration | None:
    """Read the calibration that the options name.

    Raises:
        L2CError: There is none and the precision wants one, or the other way round; or the file is
            damaged.
    """
    path = options.calibration
    if not precision_of(options.precision).calibrated:
        if path is None:
            return None
        raise L2CError(f"--calibration {path}: precision {options.precision} takes none")
    if path is None:
        raise L2CError(
            f"precision {options.precision} needs --calibration FILE; build the model in another "
            "precision, and make the file with: l2c-export calibrate BUNDLE -o FILE"
        )
    return read_calibration(path)


def default_folder(options: ScheduleOptions, calls: int) -> Path:
    """Where a bundle goes if nothing else is said: ``MODEL-SAMPLER-CALLS``."""
    return Path(f"{model_label(options)}-{options.sampler_name}-{calls}")


def model_label(options: ScheduleOptions) -> str:
    """The preset's name, or that of the file or folder that describes the model."""
    return options.model or (options.model_config.stem if options.model_config else "model")


def build_arguments(
    options: ScheduleOptions, checkpoint: Path | None, seed: int | None, guidance_scale: float | None
) -> list[str]:
    """The command line of such a build, without what is the default."""
    words = ["l2c-export", "build"]
    for field in fields(options):
        value, option = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", "-".join(map(str, dict.fromkeys(value)))]
        else:
            words += [f"--{option}", str(value)]
    for option, given in (
        ("--checkpoint", checkpoint),
        ("--random-weights", seed),
        ("--guidance-scale", guidance_scale),
    ):
        words += [] if given is None else [option, str(given)]
    return words
