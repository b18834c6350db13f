"""Casts: a model whose blocks' linear layers compute in half precision, and its weights in storage.

The model's code stays the float32 one; hooks narrow what a layer takes. Inside a branch the narrow
type goes on (attention, GELU, the slot); what leaves a layer that is no branch, adaLN's modulation
and the projection of a long skip, is float32 again, and so are residual stream and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from l2c_export.build.quantize import LARGEST, dequantize, quantize
from l2c_export.core.precision import (
    Parameters,
    Precision,
    in_block_linear,
    in_branch,
    range_name,
    scale_name,
    stored_tensors,
)
from l2c_export.errors import L2CError


def cast_model(model: nn.Module, config: Parameters, precision: Precision) -> None:
    """Cast the blocks' linear layers in place, on the meta device as well as with real weights."""
    if not precision.cast:
        return
    dtype, shapes = getattr(torch, precision.slots), config.parameters()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and in_block_linear(f"{name}.weight", shapes):
            module.to(dtype).register_forward_pre_hook(_narrow)
            if not in_branch(name):
                module.register_forward_hook(_widen)


def _narrow(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    (x,) = args
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (x.to(weight.dtype),)


def _widen(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.float()


def encode(name: str, tensor: Tensor, dtype: str, precision: Precision) -> Iterator[Tensor]:
    """What the weights file stores of a contiguous float32 parameter, in the file's order.

    Args:
        name: Of the parameter, for the message.
        tensor: The parameter.
        dtype: In which the file has it.
        precision: Of the file.

    Raises:
        L2CError: A value is beyond the dtype that the layer computes in.
    """
    computed = dtype if dtype == "float32" else precision.slots
    if computed == "float16" and not torch.isfinite(tensor.half()).all():
        raise L2CError(
            f"tensor {name} has values up to {float(tensor.abs().max()):.3g}, beyond float16's 65504; "
            "build with --precision bfloat16"
        )
    if dtype in LARGEST:
        yield from quantize(tensor, dtype, precision.slots)
    else:
        yield tensor.to(getattr(torch, dtype))


def decode(
    config: Parameters, precision: Precision, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The float32 parameters that a weights file stands for.

    Args:
        config: The model.
        precision: In which it is stored.
        read: Takes the name of a tensor in the file.

    Returns:
        Parameter name -> tensor; those stored in float32 are what ``read`` gave.
    """
    stored = stored_tensors(config, precision)

    def parameter(name: str) -> Tensor:
        if stored[name].dtype not in LARGEST:
            return read(name).float()
        weight = dequantize(read(name), read(scale_name(name)))
        return weight / read(range_name(name)) if range_name(name) in stored else weight

    return {name: parameter(name) for name in config.parameters()}
