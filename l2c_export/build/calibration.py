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

    Raises:
        L2CError: It is of others, or its layers are not the model's.
    """
    config = weights.config
    ours, theirs = config.to_json(), calibration.model
    again = "calibrate a bundle of these weights with: l2c-export calibrate BUNDLE"
    if differing := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
        raise L2CError(f"{where} is of another model ({', '.join(differing)} differ); {again}")
    if tuple(calibration.layers) != branch_weights(config):
        raise L2CError(f"{where} has other layers than the model; {again}")
    if weights_digest(config, weights.tensors.__getitem__) != calibration.weights:
        raise L2CError(f"{where} is of other weights than these; {again}")


def input_ranges(calibration: Calibration) -> dict[str, float]:
    """Range of the input of each layer: 128 steps of its int8, of which 127 are used.

    Raises:
        L2CError: One is beyond float16, in which the layers' inputs are.
    """
    ranges = {name: layer.clip * 128 / 127 for name, layer in calibration.layers.items()}
    for name, value in ranges.items():
        if value > _LARGEST:
            raise L2CError(f"the input of {name} reaches {value:.3g}, beyond float16's {_LARGEST:g}")
    # a layer that only ever saw zeros can have any range but zero
    return {name: max(value, _SMALLEST) for name, value in ranges.items()}
