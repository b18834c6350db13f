"""From what a user asks for to a plan: the model, the router or none, the sampler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2c_export.core.models import PRESETS, ModelConfig, family_defaults, preset, read_model_config
from l2c_export.core.plan import Plan, make_plan
from l2c_export.core.policies import Policy, fora, random_like
from l2c_export.core.precision import precision_of
from l2c_export.core.samplers import model_table
from l2c_export.core.schedule import Router, Schedule, threshold_router, uncached
from l2c_export.errors import L2CError

_log = logging.getLogger(__name__)

_DEFAULT_CALLS = 20

_GEOMETRY = ("hidden_size", "num_heads", "patch_size", "input_size", "in_channels")
"""What makes another model of one with as many slots."""


@dataclass(frozen=True)
class ScheduleOptions:
    """The options that ``plan`` and ``build`` share.

    Attributes:
        model: Name of a preset; None with ``model_config``.
        model_config: JSON file with a model's configuration, or a diffusers folder.
        router: Router file; None takes the released one of the preset.
        threshold: A sub-layer is computed where the router's score is above it; None is the one
            of the model's family.
        uncached: Compute everything, without a router.
        policy: A schedule made by hand, to compare with; see :meth:`Policy.parse`.
        sampler: Name of the sampler; None is the one of the model's family.
        steps: Calls of a trajectory; None takes the router's own number, or 20.
        batch: Smallest and largest number of latents in one call.
        guidance: Whether a call evaluates a conditional and an unconditional row for each latent.
        max_graphs: At most so many step graphs.
        precision: A name of :data:`l2c_export.core.precision.PRECISIONS`.
        calibration: File for a precision that wants one; a plan does not.
    """

    model: str | None = None
    model_config: Path | None = None
    router: Path | None = None
    threshold: float | None = None
    uncached: bool = False
    policy: str | None = None
    sampler: str | None = None
    steps: int | None = None
    batch: tuple[int, int] = (1, 1)
    guidance: bool = True
    max_graphs: int | None = None
    precision: str = "float32"
    calibration: Path | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        if self.model_config is not None:
            if self.model_config.is_dir():
                from l2c_export.build.diffusers_folder import config_from_diffusers

                return config_from_diffusers(self.model_config)
            return read_model_config(self.model_config)
        if self.model is None:
            raise L2CError("name a model with --model NAME or --model-config FILE")
        return preset(self.model)

    @property
    def sampler_name(self) -> str:
        """The sampler: the one that is asked for, or that of the model's family."""
        return self.sampler or family_defaults(self.config).sampler


def plan_from_options(options: ScheduleOptions) -> Plan:
    """Plan what the options ask for; reads the router, and no weights.

    Raises:
        L2CError: The parts do not fit each other, or a file is missing or broken.
    """
    config = options.config
    return plan_schedule(options, config, _schedule(options, config))


def plan_schedule(options: ScheduleOptions, config: ModelConfig, schedule: Schedule) -> Plan:
    """Plan a schedule with the sampler, the guidance and the budget of the options.

    Raises:
        L2CError: The parts do not fit each other.
    """
    return make_plan(
        config,
        schedule,
        model_table(options.sampler_name, schedule.calls, config),
        guidance=options.guidance,
        max_graphs=options.max_graphs,
        precision=precision_of(options.precision),
        sampler=options.sampler_name,
    )


def _schedule(options: ScheduleOptions, config: ModelConfig) -> Schedule:
    calls = options.steps or _DEFAULT_CALLS
    if options.uncached:
        return uncached(config.slots, calls)
    policy = Policy.parse(options.policy) if options.policy is not None else None
    if policy is None:
        return _routed(options, config)
    if policy.kind == "fora":
        return fora(config.slots, calls, policy.number, policy.option)
    return random_like(_routed(options, config), policy.number, config.slot_macs(), policy.option)


def _routed(options: ScheduleOptions, config: ModelConfig) -> Schedule:
    router = router_from_options(options, config)
    calls = options.steps or router.calls
    threshold = options.threshold
    if threshold is None:
        threshold = family_defaults(config).threshold
    return threshold_router(router, config.slots, options.sampler_name, calls, threshold)


def router_from_options(options: ScheduleOptions, config: ModelConfig) -> Router:
    """Read the router that the options name, or the released one of their model.

    A router that says what model it was trained for, and means another, is taken with a warning.

    Raises:
        L2CError: There is none, or its file is broken or for another family of models.
    """
    from l2c_export.build.router_file import read_router

    path = options.router
    if path is None:
        if options.model is None:
            raise L2CError("there is no released router for this model; use --router FILE")
        from l2c_export.build.download import find_router

        path = find_router(options.model, options.sampler_name, options.steps or _DEFAULT_CALLS)
    router = read_router(path, config.family)
    _warn_of_another_model(router, config)
    return router


def _warn_of_another_model(router: Router, config: ModelConfig) -> None:
    from l2c_export.build.download import released_for

    training = router.source.get("training", {})
    name = released_for(router.source["sha256"]) or _preset_of(str(training.get("model")), training)
    if name is None:
        return
    theirs, ours = preset(name).to_json(), config.to_json()
    other = [f"{key} {ours[key]}, not {theirs[key]}" for key in _GEOMETRY if ours[key] != theirs[key]]
    if other:
        _log.warning(
            "router %s was trained for %s, and this model is another (%s): which of its sub-layers may "
            "be reused is then a guess; l2c-export train-router makes one for it",
            router.source["file"],
            name,
            "; ".join(other),
        )


def _preset_of(model: str, training: Mapping[str, Any]) -> str | None:
    """The preset that the authors' code calls DiT-XL/2."""
    name = model.lower().replace("/", "-") + ("-512" if training.get("image_size") == 512 else "")
    return name if name in PRESETS else None
