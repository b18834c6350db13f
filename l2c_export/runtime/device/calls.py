"""What a call enqueues: the buffers of one trajectory, and engines bound to them."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest, ProgramCall
from l2c_export.core.engines import UPDATE, EngineSet, update_coefficients, update_terms
from l2c_export.core.sublayers import carried_values
from l2c_export.runtime.backends import Array
from l2c_export.runtime.device.bound import Bound
from l2c_export.runtime.device.conditioning import ConditioningTable
from l2c_export.runtime.device.memory import Arena, item_bytes, padded
from l2c_export.runtime.device.protocols import Device, Engine
from l2c_export.runtime.device.staging import Staging, Stream
from l2c_export.runtime.device.weights import DeviceWeights
from l2c_export.runtime.inputs import check_batch
from l2c_export.runtime.noise import NoiseSource
from l2c_export.runtime.sampler_state import Floats

GIVEN = frozenset({"start", "guidance_scale", "labels", "timesteps", "coefficients", "noise"})
"""Buffers that the host fills; engines fill all others."""


class Shared(Protocol):
    """What all sessions of a runner have in common: the backend."""

    device: Device
    manifest: Manifest
    engines: EngineSet
    weights: DeviceWeights
    graphs: str

    def engine(self, graph: str) -> Engine:
        """A loaded engine."""

    def compiled(self) -> None:
        """Told when kernels may have been compiled."""


class Calls:
    """Buffers, contexts and a stream; knows how to enqueue any call, and nothing of their order.

    Attributes:
        batch: B, latents of a trajectory.
        stream: Everything runs there, in order.
        bytes: Purpose to bytes of device memory.
    """

    def __init__(self, shared: Shared, batch: int) -> None:
        manifest = shared.manifest
        check_batch(manifest, batch)
        self.batch = batch
        self._shared, self._device, self._manifest = shared, shared.device, manifest
        self._shape = (batch, *manifest.latent)
        self._latent_bytes = 4 * math.prod(self._shape)
        self._slot_shape = (batch * manifest.rows, *manifest.slots.shape)
        self._slot_bytes = math.prod(self._slot_shape) * item_bytes(manifest.slots.dtype)
        self._targets, self._sources = update_terms(manifest)
        self._table = ConditioningTable(manifest, shared.engines, batch)
        self._sizes = {"batch": batch, "rows": batch * manifest.rows, "n": self._table.n}
        self._carried = self._carried_bytes()
        self._bound: dict[str, Bound] = {}
        self._program: tuple[ProgramCall, ...] = ()
        self._chunk: int | None = None
        self._once = False  # whether what is enqueued now has addresses that do not come again
        self._closing = contextlib.ExitStack()
        with self._device.current(), contextlib.ExitStack() as undo:
            self._arena = Arena(self._device, f"a session of batch {batch}", self._buffers())
            undo.callback(self._arena.close)
            graphs = shared.engines.program(manifest)
            self._scratch = Arena(
                self._device,
                "the scratch memory of the engines",
                {"scratch": max(shared.engine(name).scratch for name in graphs)},
            )
            undo.callback(self._scratch.close)
            self._stream = Stream(self._device)
            self.stream = self._stream.handle
            inputs = ["start", "guidance_scale", "labels", *({"noise"} & set(self._sources))]
            self._staging = Staging(self._device, self._arena, inputs)
            self._send(self._coefficients(), "coefficients")
            self._send(self._table.timesteps(), "timesteps")
            self._closing = undo.pop_all()
        self.bytes = {"buffers": self._arena.size, "scratch": self._scratch.size}

    def _buffers(self) -> dict[str, int]:
        """Name to bytes of everything that a trajectory needs.

        Two of x and of each history: an engine may not write what it reads.
        """
        calls = len(self._manifest.calls)
        row = 4 * len(self._targets) * len(self._sources)
        noise = calls * padded(self._latent_bytes) if "noise" in self._sources else 0
        banks = [f"{name}.{bank}" for name in self._targets for bank in (0, 1)]
        slots = [f"slot.{i}" for i in range(self._manifest.buffers)]
        return {
            "start": self._latent_bytes,
            "output": self._latent_bytes,
            **dict.fromkeys(banks, self._latent_bytes),
            **dict.fromkeys(slots, self._slot_bytes),
            **self._carried,
            "guidance_scale": 4,
            "coefficients": calls * padded(row),
            **({"noise": noise} if noise else {}),
            **self._table.sizes,
        }

    def _carried_bytes(self) -> dict[str, int]:
        """Buffer for what stages of a call hand on to its bytes."""
        engines = self._shared.engines
        passed = {engine.graph: (*engine.inputs, *engine.outputs) for engine in engines.engines}
        return {
            name: math.prod(value.sized(self._sizes)) * item_bytes(value.dtype)
            for name, value in carried_values(passed, engines.stages).items()
        }

    def _coefficients(self) -> Floats:
        """(calls, stride) one aligned row a call."""
        table = update_coefficients(self._manifest)
        rows = table.reshape(len(table), -1)
        wide = np.zeros((len(rows), padded(4 * rows.shape[1]) // 4), np.float32)
        wide[:, : rows.shape[1]] = rows
        return wide

    def _drawn(self, draw: NoiseSource | None) -> Floats:
        """(calls, stride) the noise of all calls, in their order."""
        assert draw is not None
        wide = np.zeros((len(self._manifest.calls), padded(self._latent_bytes) // 4), np.float32)
        one: Floats = np.empty(self._shape, np.float32)
        for index, row in enumerate(wide):
            draw(index, one)
            row[: one.size] = one.ravel()
        return wide

    def _begin(self) -> None:
        """The latent is the noise; what the sampler keeps is zero, since 0 times NaN is NaN."""
        self._copy(self._arena["x.0"], self._arena["start"], self._latent_bytes)
        for name in self._targets[1:]:
            self._fill(self._arena[f"{name}.0"], 0, self._latent_bytes)

    def _condition(self, index: int) -> None:
        """See that the table has the rows of a call."""
        chunk = self._table.chunk_of(index)
        if chunk != self._chunk:
            self._table.fill(self._arena, chunk, self._engine, self._copy)
            self._chunk = chunk

    def _call(self, index: int) -> None:
        call, arena = self._program[index], self._arena
        old, new = index % 2, (index + 1) % 2
        slots = {slot: arena[f"slot.{b}"] for slot, b in (call.reads | call.writes).items()}
        inputs = self._call_inputs(index)
        self._network(call, inputs | slots | {"x": arena[f"x.{old}"], "output": arena["output"]})
        update = {name: arena[f"{name}.{old}"] for name in self._targets}
        update |= {f"{name}.next": arena[f"{name}.{new}"] for name in self._targets}
        update |= {"output": arena["output"], "coefficients": self._row("coefficients", index)}
        if "noise" in self._sources:
            update["noise"] = self._row("noise", index)
        self._engine(UPDATE, update)

    def _call_inputs(self, index: int) -> dict[str, int]:
        """What a call reads beside the latent and slots."""
        return {
            **self._table.addresses(self._arena, index),
            "guidance_scale": self._arena["guidance_scale"],
        }

    def _network(self, call: ProgramCall, addresses: dict[str, int]) -> None:
        """Enqueue what a call computes: an engine, or one for each stage."""
        stages = self._shared.engines.stages
        if not stages:
            self._engine(call.graph, addresses)
            return
        names, weights = self._manifest.slots.names, self._shared.weights
        own = {name: self._arena[f"slot.{i}"] for i, name in enumerate(names)}
        own |= {name: self._arena[name] for name in self._carried} | addresses
        for stage in stages:
            if (piece := stage.piece(stage.slot in call.reads)) is not None:
                values = {
                    ours: own[theirs] if theirs in own else weights[theirs]
                    for ours, theirs in piece.values.items()
                }
                self._engine(piece.engine, values)

    def _row(self, table: str, index: int) -> int:
        """Address of a call's row in a table."""
        stride = self._arena.sizes[table] // len(self._manifest.calls)
        return self._arena[table] + index * stride

    def _engine(self, graph: str, addresses: dict[str, int]) -> None:
        """Enqueue an engine; every engine has one context, bound anew where addresses changed."""
        if graph not in self._bound:
            engine = self._shared.engine(graph)
            if engine.scratch > self._scratch.size:  # of a graph that the program does not use
                self._scratch = Arena(self._device, "more scratch memory", {"scratch": engine.scratch})
                self._closing.callback(self._scratch.close)
                self.bytes["scratch"] += self._scratch.size  # contexts made before keep the other
            context = engine.context(self._scratch["scratch"], self._scratch.size, self.stream)
            record = self._shared.engines.engine(graph)
            self._bound[graph] = Bound(record, context, self._shared.weights, self._sizes)
        self._bound[graph].enqueue(addresses, self.stream, self._once)

    def _copy(self, target: int, source: int, size: int) -> None:
        self._device.copy(target, source, size, self.stream)

    def _fill(self, target: int, byte: int, size: int) -> None:
        self._device.fill(target, byte, size, self.stream)

    def _send(self, array: NDArray[Any], buffer: str) -> None:
        self._device.upload(self._arena[buffer], np.ascontiguousarray(array), self.stream)

    def _fetched(self, buffer: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        array: Array = np.empty(shape, dtype)
        self._device.download(array, self._arena[buffer], self.stream)
        self._device.synchronize(self.stream)
        return array

    def _latest_of(self, index: int) -> str:
        """The buffer of the latent after so many calls."""
        return f"x.{index % 2}" if index else "start"
