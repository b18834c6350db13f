"""The supported models: geometry alone, no weights.

A configuration knows everything that planning needs, so a plan can be made for a model that is not
on this machine. The PyTorch module of the same configuration lives in ``l2c_export.build``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from l2c_export.core.dit_config import DIT_PRESETS, DiTConfig
from l2c_export.core.geometry import Shape, slot
from l2c_export.core.uvit_config import UVIT_PRESETS, UViTConfig
from l2c_export.errors import L2CError

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Defaults",
    "DiTConfig",
    "ModelConfig",
    "Shape",
    "UViTConfig",
    "config_from_json",
    "family_defaults",
    "preset",
    "read_model_config",
    "slot",
]

ModelConfig = DiTConfig | UViTConfig

FAMILIES: dict[str, type[DiTConfig] | type[UViTConfig]] = {"dit": DiTConfig, "uvit": UViTConfig}
"""The configuration of each model family."""

PRESETS: dict[str, ModelConfig] = {**DIT_PRESETS, **UVIT_PRESETS}
"""The official configurations by name; 256 x 256 pixels without a suffix."""


@dataclass(frozen=True)
class Defaults:
    """What Learning-to-Cache and the official samplers use for a family, where a user names nothing.

    Attributes:
        sampler: The sampler that the released routers were trained for.
        threshold: At which they are used.
        guidance_scale: s in uncond + s * (cond - uncond), which is the convention of every bundle.
            U-ViT's code writes cond + w * (cond - uncond): its w = 0.4 is s = 1.4 here.
    """

    sampler: str
    threshold: float
    guidance_scale: float


_DEFAULTS = {"dit": Defaults("ddim", 0.1, 4.0), "uvit": Defaults("dpm-solver-2s", 0.9, 1.4)}


def family_defaults(config: ModelConfig) -> Defaults:
    """The defaults of a model's family."""
    return _DEFAULTS[config.family]


def preset(name: str) -> ModelConfig:
    """The configuration of a named model.

    Raises:
        L2CError: There is no model of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise L2CError(f"unknown model {name!r}; known: {', '.join(PRESETS)}") from None


def config_from_json(data: object, where: str) -> ModelConfig:
    """Make a configuration from the ``model`` object of a manifest or a file, refusing unknown keys."""
    if not isinstance(data, Mapping):
        raise L2CError(f"{where}: the model configuration must be a JSON object")
    families = ", ".join(FAMILIES)
    if "family" not in data:
        raise L2CError(
            f"{where}: the model configuration has no 'family'; this release has: {families}"
        )
    family = FAMILIES.get(data["family"]) if isinstance(data["family"], str) else None
    if family is None:
        raise L2CError(
            f"{where}: model family {data['family']!r} is not supported; this release has: {families}"
        )
    known = [field.name for field in fields(family)]
    if unknown := sorted(set(data) - set(known)):
        raise L2CError(f"{where}: unknown model key(s) {', '.join(unknown)}; known: {', '.join(known)}")
    given = dict(data)
    if family is DiTConfig:
        channels = data.get("in_channels", DiTConfig.in_channels)
        given.setdefault("guidance_channels", min(3, channels) if isinstance(channels, int) else 3)
    try:
        return family(**given)
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s:") or str(error)
        raise L2CError(f"{where}: the model configuration lacks {missing.strip()}") from None
    except L2CError as error:
        raise L2CError(f"{where}: {error}") from None


def read_model_config(path: Path) -> ModelConfig:
    """Read ``--model-config``: a JSON file with a model object, or with one under ``"model"``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise L2CError(f"cannot read model configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise L2CError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    return config_from_json(data, str(path))
