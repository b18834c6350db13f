"""What depends on timestep and label alone, in device memory for many calls at once.

Its weights, a third of all in DiT, are read once for a chunk of calls. A chunk fills a table with one
aligned row a call, at whose addresses the calls are bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import CONDITIONING, Manifest
from l2c_export.core.engines import EngineSet
from l2c_export.errors import L2CError
from l2c_export.runtime.device.memory import Arena, item_bytes, padded

# As in runtime/session.py.
_TABLE_BYTES = 64 << 20

Enqueue = Callable[[str, dict[str, int]], None]
"""Runs an engine with its tensors at addresses."""

Copy = Callable[[int, int, int], None]
"""Copies to an address, from an address, so many bytes."""


class ConditioningTable:
    """Sizes of the table, and how it is filled.

    Attributes:
        calls: Calls of a chunk.
        n: Rows of the conditioning engine's run: the same for every chunk.
        sizes: Buffers that it needs, by name.
    """

    def __init__(self, manifest: Manifest, engines: EngineSet, batch: int) -> None:
        outputs = engines.engine(CONDITIONING).outputs
        self._rows = batch * manifest.rows
        self._bytes = {
            value.name: self._rows * math.prod(map(int, value.shape[1:])) * item_bytes(value.dtype)
            for value in outputs
        }
        self._stride = {name: padded(size) for name, size in self._bytes.items()}
        self._unaligned = [name for name, size in self._bytes.items() if size != self._stride[name]]
        self._timesteps = np.array([call.timestep for call in manifest.calls], np.float32)
        self._null = manifest.guidance.null_label if manifest.guidance else None
        self.calls = self._chunk(engines)
        self.n = self.calls * self._rows
        self._chunks = -(-len(self._timesteps) // self.calls)
        self.sizes = {
            "labels": 8 * self.n,
            "timesteps": self._chunks * padded(4 * self.n),
            **{name: self.calls * stride for name, stride in self._stride.items()},
            **{f"{name}.packed": self.calls * self._bytes[name] for name in self._unaligned},
        }

    def _chunk(self, engines: EngineSet) -> int:
        """How many calls at once: as many as the table may hold and the engine takes."""
        calls = min(len(self._timesteps), max(1, _TABLE_BYTES // sum(self._stride.values())))
        low, _, high = engines.ranges.get("n", (1, 0, calls * self._rows))
        calls = min(calls, high // self._rows)
        if calls < 1 or calls * self._rows < low:
            raise L2CError(
                f"the conditioning engine of {engines.folder} takes {low} to {high} rows at once, "
                f"this batch has {self._rows} a call; build the engines for it"
            )
        return calls

    def timesteps(self) -> NDArray[np.float32]:
        """(chunks, stride) what ``"timesteps"`` holds in every trajectory: one aligned row a chunk."""
        wide = np.zeros((self._chunks, padded(4 * self.n) // 4), np.float32)
        for chunk, row in enumerate(wide):
            of = self._timesteps[chunk * self.calls : (chunk + 1) * self.calls]
            # the last chunk is filled up, so that all have one shape
            of = np.concatenate([of, np.full(self.calls - len(of), of[-1], np.float32)])
            row[: self.n] = np.repeat(of, self._rows)
        return wide

    def labels(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) what ``"labels"`` holds for (B,) classes: those of every call of a chunk."""
        if self._null is not None:
            labels = np.concatenate([labels, np.full_like(labels, self._null)])
        return np.tile(labels, self.calls)

    def fill(self, arena: Arena, chunk: int, enqueue: Enqueue, copy: Copy) -> None:
        """Enqueue the computation of a chunk."""
        inputs = {"timestep": self._timesteps_at(arena, chunk), "label": arena["labels"]}
        outputs = {name: arena[name] for name in self._stride}
        packed = {name: arena[f"{name}.packed"] for name in self._unaligned}
        enqueue(CONDITIONING, inputs | outputs | packed)
        for name, source in packed.items():
            size, stride = self._bytes[name], self._stride[name]
            for i in range(self.calls):
                copy(arena[name] + i * stride, source + i * size, size)

    def chunk_of(self, call: int) -> int:
        """The chunk that a call is in."""
        return call // self.calls

    def addresses(self, arena: Arena, call: int) -> dict[str, int]:
        """Output of the conditioning engine to a call's rows of it, while its chunk is in the table."""
        row = call % self.calls
        return {name: arena[name] + row * stride for name, stride in self._stride.items()}

    def _timesteps_at(self, arena: Arena, chunk: int) -> int:
        return arena["timesteps"] + chunk * padded(4 * self.n)
