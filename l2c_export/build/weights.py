"""The weights file: every parameter once, in safetensors, at offsets that its geometry fixes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from l2c_export.build.precision import encode
from l2c_export.core.bundle import WEIGHTS
from l2c_export.core.files import replacing
from l2c_export.core.models import ModelConfig, Shape
from l2c_export.core.precision import (
    FLOAT32,
    Precision,
    StoredTensor,
    range_name,
    stored_tensors,
)

_ALIGNMENT = 4096  # the data starts on a page, so that it can be mapped
_SAFETENSORS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
}
_ONNX = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class WeightsLayout:
    """Where each tensor lies in ``weights.safetensors``; known before any weight is."""

    config: ModelConfig
    precision: Precision = FLOAT32

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What the file holds, in order."""
        return stored_tensors(self.config, self.precision)

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Tensor name to first and last-plus-one byte, from the start of the data."""
        spans, at = {}, 0
        for name, tensor in self.tensors.items():
            spans[name] = (at, at + tensor.nbytes)
            at += tensor.nbytes
        return spans

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header of the safetensors file, padded with spaces to a page."""
        entries = {
            name: {
                "dtype": _SAFETENSORS[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": list(self.spans[name]),
            }
            for name, tensor in self.tensors.items()
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def reference(self, name: str, shape: Shape) -> ir.ExternalTensor:
        """A tensor as ONNX external data; ``shape`` may add leading ones."""
        begin, end = self.spans[name]
        return ir.ExternalTensor(
            location=WEIGHTS,
            offset=len(self.header) + begin,
            length=end - begin,
            dtype=_ONNX[self.tensors[name].dtype],
            shape=ir.Shape(shape),
            name=name,
        )


def write_weights(
    path: Path,
    layout: WeightsLayout,
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranges: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write the weights file, one tensor in memory at a time.

    Args:
        path: The file, which appears whole or not at all.
        layout: Its layout.
        tensors: Every parameter's name and contiguous float32 tensor, in model order.
        progress: Called with bytes written and bytes in all.
        ranges: (in,) float32 of the inputs of the layers that quantise them, by the names of their
            weights, which are stored multiplied by them.
    """
    written = 0
    total = len(layout.header) + max((end for _, end in layout.spans.values()), default=0)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for chunk in _chunks(layout, tensors, ranges):
            file.write(chunk)
            written += len(chunk)
            progress(written, total)


def _chunks(
    layout: WeightsLayout, tensors: Iterable[tuple[str, Tensor]], ranges: Mapping[str, Tensor]
) -> Iterator[memoryview]:
    yield memoryview(layout.header)
    expected = iter(layout.spans.items())
    for name, tensor in tensors:
        given = [ranges[name]] if range_name(name) in layout.tensors else []
        for limits in given:
            tensor = tensor * limits
        encoded = encode(name, tensor, layout.tensors[name].dtype, layout.precision)
        for stored in itertools.chain(encoded, given):
            wanted, (begin, end) = next(expected)
            array: Any = stored.reshape(-1).view(torch.uint8).numpy()
            if layout.tensors[wanted].parameter != name or array.size != end - begin:
                raise AssertionError(f"{name} came where {wanted} of {end - begin} bytes belongs")
            yield memoryview(array)
    if missing := next(expected, None):
        raise AssertionError(f"no tensor came for {missing[0]}")
