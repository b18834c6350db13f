"""Whether a calibration is of the weights that are to be built, and what a build takes from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from l2c_export.build.stored import Checkpoint
from l2c_export.core.calibration import Calibration
from l2c_export.core.models import ModelConfig
from l2c_export.core.precision import branch_weights, in_block_linear
from l2c_export.errors import L2CError

_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-14  # with all its digits
_OWN = 0.65  # part of a channel's own maximum in its range, as an exponent


def weights_digest(config: ModelConfig, read: Callable[[str], Tensor]) -> str:
    """Digest of a model's weights that does not depend on the precision in which they are stored.

    It is taken of those parameters that every precision stores in float32: embedders, the final
    layer, and what else is not in the blocks' linear layers.

    Args:
        config: The model.
        read: Takes the name of a parameter.

    Returns:
        Hexadecimal SHA-256 of names and float32 values, in model order.
    """
    shapes = config.parameters()
    digest = hashlib.sha256()
    for name in shapes:
        if not in_block_linear(name, shapes):
            tensor = read(name).detach().to(torch.float32).contiguous()
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_calibration(calibration: Calibration, where: str, weights: Checkpoint) -> None:
    """See that a calibration is of a model and its weights; ``where`` begins the messages.

    Weights that differ in the blocks' linear layers alone are not told apart.

    Raises:
        L2CError: It is of others, or its layers are not the model's.
    """
    config = weights.config
    ours, theirs = config.to_json(), calibration.model
    again = "calibrate a bundle of these weights with: l2c-export calibrate BUNDLE"
    if differing := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
        raise L2CError(f"{where} is of another model ({', '.join(differing)} differ); {again}")
    shapes = config.parameters()
    inputs = {name: shapes[name][1] for name in branch_weights(config)}
    if {name: len(maxima) for name, maxima in calibration.layers.items()} != inputs:
        raise L2CError(f"{where} has other layers than the model; {again}")
    if weights_digest(config, weights.tensors.__getitem__) != calibration.weights:
        raise L2CError(f"{where} is of other weights than these; {again}")


def input_ranges(calibration: Calibration) -> dict[str, Tensor]:
    """Ranges of the inputs of each layer, by the names of their weights: 128 steps, 127 of them used.

    With one step for all channels, the small ones get few; with a step of its own for each, a weight
    of a small channel shares its scale with those of large ones, after they were multiplied by the
    ranges. So a channel's range is between its own maximum and the layer's (SmoothQuant, Xiao et al.
    2023, arXiv 2211.10438, eq. 4, but for the weights' part in it).

    Returns:
        (in,) float32, above 0.

    Raises:
        L2CError: One is beyond float16, in which the layers' inputs are.
    """
    ranges = {}
    for name, maxima in calibration.layers.items():
        channels = torch.tensor(maxima, dtype=torch.float64)
        largest = channels.max()
        if largest > _LARGEST:
            raise L2CError(f"the input of {name} reaches {largest:.3g}, beyond float16's {_LARGEST:g}")
        smoothed = channels**_OWN * largest ** (1 - _OWN) * 128 / 127
        # a channel that only ever held zeros can have any range but zero
        ranges[name] = smoothed.clamp(float(largest) / 1e3, _LARGEST).clamp(_SMALLEST).float()
    return ranges
