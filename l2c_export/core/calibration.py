"""A calibration: how large the inputs of the branches' linear layers get, in a file of text.

Static quantisation maps a layer's input to int8 by numbers that are known before it runs. They come of
whole trajectories in which nothing is cached, so that one file serves every router, threshold and
schedule of a model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from l2c_export.core.files import key_of, write_json
from l2c_export.errors import L2CError, UnsupportedError

_FORMAT, _VERSION = "l2c-calibration", 1


@dataclass(frozen=True)
class Calibration:
    """What a calibration file holds.

    Attributes:
        model: The model's configuration.
        weights: Digest of the parameters that every precision stores in float32: it tells of other
            embedders or another final layer, but not of other blocks alone, as after merging a LoRA;
            see :func:`l2c_export.build.calibration.weights_digest`.
        sampler: Name of the sampler.
        calls: Of a trajectory.
        samples: Trajectories.
        seed: Of their labels and noise.
        guidance_scale: None without guidance.
        layers: Weight of each linear layer of a branch, in model order, to the largest magnitude that
            was seen in each of its input channels.
    """

    model: dict[str, Any]
    weights: str
    sampler: str
    calls: int
    samples: int
    seed: int
    guidance_scale: float | None
    layers: dict[str, tuple[float, ...]]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the content."""
        return key_of(asdict(self))

    @property
    def source(self) -> dict[str, Any]:
        """What a manifest says of it."""
        facts = asdict(self)
        names = ("sampler", "calls", "samples", "seed", "guidance_scale")
        return {"digest": self.digest} | {name: facts[name] for name in names}


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file whole."""
    layers = {name: " ".join(map(repr, maxima)) for name, maxima in calibration.layers.items()}
    data = {"format": _FORMAT, "version": _VERSION, **asdict(calibration), "layers": layers}
    write_json(path, data)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        L2CError: There is none, or it is damaged.
        UnsupportedError: A later release wrote it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise L2CError(f"calibration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise L2CError(f"calibration {path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise L2CError(f"{path} is no calibration; make one with: l2c-export calibrate BUNDLE")
    if (version := data.pop("version", None)) != _VERSION:
        raise UnsupportedError(
            f"calibration {path} is of version {version}, this release reads {_VERSION}; make it again"
        )
    try:
        layers = {name: tuple(map(float, text.split())) for name, text in data.pop("layers").items()}
        made = Calibration(layers=layers, **data)
        _check(made)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise L2CError(f"calibration {path} is damaged ({error}); make it again") from None
    return made


def _check(made: Calibration) -> None:
    if not isinstance(made.model, dict):
        raise TypeError("model is no object")
    for name, maxima in made.layers.items():
        if not maxima or not all(0 <= value < math.inf for value in maxima):
            raise ValueError(f"{name} has other values than magnitudes")
