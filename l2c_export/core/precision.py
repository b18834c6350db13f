"""Precisions: how a bundle stores its weights, and in what its graphs compute.

Only the linear layers inside the blocks leave float32. They hold almost all weights and arithmetic;
what is left is small and accuracy hangs on it: patch, timestep and label embeddings, the residual
stream, norms and what modulates them, softmax, the final layer, guidance and the sampler's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from l2c_export.errors import L2CError

Shape = tuple[int, ...]

_BLOCKS = ("blocks.", "in_blocks.", "mid_block.", "out_blocks.")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}


class Parameters(Protocol):
    """What is needed of a model's configuration."""

    def parameters(self) -> dict[str, Shape]:
        """Parameter names and shapes, in model order."""


@dataclass(frozen=True)
class Precision:
    """A row of :data:`PRECISIONS`.

    Attributes:
        name: As ``--precision`` and the manifest have it.
        weights: Stored dtype of the weights of the blocks' linear layers.
        slots: Dtype of what those layers put out, and so of the cache slots.
        summary: What it is, in a line.
        dynamic: Whether branches quantise what meets those weights, at run time, and multiply in int8.
        calibrated: Whether they do so by ranges that a calibration has found.
    """

    name: str
    weights: str
    slots: str
    summary: str
    dynamic: bool = False
    calibrated: bool = False

    @property
    def cast(self) -> bool:
        """Whether the blocks' linear layers compute in a narrower floating-point type."""
        return self.slots != "float32"

    @property
    def scaled(self) -> bool:
        """Whether the weights of the blocks' linear layers are stored in 8 bits, with scales."""
        return self.weights != self.slots

    @property
    def slot_value_bytes(self) -> int:
        """Bytes of one value of a slot."""
        return _BYTES[self.slots]


PRECISIONS = {
    row.name: row
    for row in (
        Precision("float32", "float32", "float32", "everything in float32"),
        Precision(
            "float16", "float16", "float16", "the blocks' linear layers and attention in float16"
        ),
        Precision(
            "bfloat16", "bfloat16", "bfloat16", "the blocks' linear layers and attention in bfloat16"
        ),
        Precision(
            "int8", "int8", "float32", "the blocks' linear layers in int8, for CPUs", dynamic=True
        ),
        Precision(
            "int8-weights", "int8", "float16", "float16, the blocks' weights in int8 with scales"
        ),
        Precision(
            "float8-weights",
            "float8_e4m3fn",
            "float16",
            "float16, the blocks' weights in float8 E4M3 with scales",
        ),
        Precision(
            "int8-static",
            "int8",
            "float16",
            "float16, branches multiplied in int8 with calibrated ranges, for engines",
            calibrated=True,
        ),
    )
}
"""What ``build --precision`` makes, by name."""

FLOAT32 = PRECISIONS["float32"]


def precision_of(name: str) -> Precision:
    """The precision of a name.

    Raises:
        L2CError: There is none of that name.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise L2CError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the weights file.

    Attributes:
        parameter: The model's parameter that it stores, or helps to store.
        dtype: Name of its dtype.
        shape: Its shape.
    """

    parameter: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return _BYTES[self.dtype] * math.prod(self.shape)


def stored_tensors(config: Parameters, precision: Precision) -> dict[str, StoredTensor]:
    """What the weights file of a model holds, by name, in order."""
    shapes = config.parameters()
    stored: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        if not in_block_linear(name, shapes):
            stored[name] = StoredTensor(name, "float32", shape)
        elif len(shape) == 1 or not precision.scaled:
            stored[name] = StoredTensor(name, precision.slots, shape)
        else:
            stored[name] = StoredTensor(name, precision.weights, shape[::-1])
            stored[scale_name(name)] = StoredTensor(name, precision.slots, shape[:1])
            if precision.calibrated and in_branch(name):
                stored[range_name(name)] = StoredTensor(name, "float32", shape[1:])
    return stored


def scale_name(weight: str) -> str:
    """Name of the (out,) scales of a weight in 8 bits, which is stored as (in, out)."""
    return f"{weight}_scale"


def range_name(weight: str) -> str:
    """Name of the (in,) ranges of what a linear layer of a branch takes, where they are calibrated."""
    return f"{weight.removesuffix('.weight')}.input_range"


def branch_weights(config: Parameters) -> tuple[str, ...]:
    """Names of the weights of the linear layers of all branches, in model order."""
    shapes = config.parameters()
    return tuple(
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and in_block_linear(name, shapes) and in_branch(name)
    )


def in_block_linear(name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a parameter is the weight or bias of a linear layer inside a block."""
    layer = name.rpartition(".")[0]
    return name.startswith(_BLOCKS) and len(shapes.get(f"{layer}.weight", ())) == 2


def in_branch(name: str) -> bool:
    """Whether a block's layer or parameter is part of attention or MLP, whose output is a slot."""
    return bool({"attn", "mlp"} & set(name.split(".")))
