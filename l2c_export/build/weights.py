"""The weights file: every parameter once, in safetensors, at offsets that the geometry alone fixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from l2c_export.core.bundle import WEIGHTS
from l2c_export.core.files import replacing
from l2c_export.core.models import ModelConfig, Shape

_ALIGNMENT = 4096  # the data starts on a page, so that it can be mapped


@dataclass(frozen=True)
class WeightsLayout:
    """Where each parameter lies in ``weights.safetensors``; known before any weight is."""

    config: ModelConfig

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Parameter name to first and last-plus-one byte, from the start of the data."""
        spans, at = {}, 0
        for name, shape in self.config.parameters().items():
            size = 4 * int(np.prod(shape))
            spans[name] = (at, at + size)
            at += size
        return spans

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header of the safetensors file, padded with spaces to a page."""
        shapes = self.config.parameters()
        entries = {
            name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": list(span)}
            for name, span in self.spans.items()
        }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def reference(self, name: str, shape: Shape) -> ir.ExternalTensor:
        """A parameter as ONNX external data; ``shape`` may add leading ones."""
        begin, end = self.spans[name]
        return ir.ExternalTensor(
            location=WEIGHTS,
            offset=len(self.header) + begin,
            length=end - begin,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=name,
        )


def write_weights(
    path: Path,
    layout: WeightsLayout,
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the weights file, one tensor in memory at a time.

    Args:
        path: The file, which appears whole or not at all.
        layout: Its layout.
        tensors: Name and contiguous float32 tensor, in the layout's order.
        progress: Called with bytes written and bytes in all.
    """
    written = 0
    total = len(layout.header) + max((end for _, end in layout.spans.values()), default=0)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for chunk in _chunks(layout, tensors):
            file.write(chunk)
            written += len(chunk)
            progress(written, total)


def _chunks(layout: WeightsLayout, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(layout.header)
    expected = iter(layout.spans.items())
    for name, tensor in tensors:
        wanted, (begin, end) = next(expected)
        array: Any = tensor.numpy()
        data = memoryview(array).cast("B")
        if name != wanted or len(data) != end - begin:
            raise AssertionError(f"{name} came where {wanted} of {end - begin} bytes belongs")
        yield data
    if missing := next(expected, None):
        raise AssertionError(f"no tensor came for {missing[0]}")
