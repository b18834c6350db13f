"""A session on a device: a trajectory on one stream, call by call or as a graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from l2c_export.errors import L2CError
from l2c_export.runtime.backends import Array
from l2c_export.runtime.device.arrays import Borrowed, DeviceArray, on_device
from l2c_export.runtime.device.bfloat16 import from_stored, host_type, stored_type, to_stored
from l2c_export.runtime.device.calls import Shared
from l2c_export.runtime.device.graphs import GraphedCalls
from l2c_export.runtime.device.memory import Arena
from l2c_export.runtime.inputs import (
    check_floats,
    check_guidance,
    check_labels,
    check_noise,
)
from l2c_export.runtime.noise import noise_source
from l2c_export.runtime.sampler_state import Floats
from l2c_export.runtime.session import CallResult, uncached_program


class DeviceSession(GraphedCalls):
    """One trajectory at a time, in device memory of its own; for one thread at a time.

    It does what :class:`l2c_export.runtime.Session` does. What differs: arrays that it returns are
    copies in host memory, so what is changed in them goes nowhere; and :meth:`run` enqueues a whole
    trajectory without waiting for it.

    Attributes:
        batch: B, latents of a trajectory.
        stream: Everything of the session runs there, in order.
        graphs: ``"trajectory"``, ``"call"``, ``"engine"`` or ``"none"``: what one launch runs.
        bytes: Purpose to bytes of device memory that this session holds.
    """

    def __init__(self, shared: Shared, batch: int) -> None:
        super().__init__(shared, batch)
        self._index = 0
        self._held: dict[str, int] = {}
        self._follower: int | None = None
        self._told: set[bool] = set()
        self._closed = False

    def close(self) -> None:
        """Give all device memory back; the session is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        with self._device.current():
            self._device.synchronize(self.stream)
            for graph in itertools.chain(*self._ready.values()):
                self._device.destroy_graph(graph)
            self._ready.clear()
            self._bound.clear()  # contexts go before the memory that they run in
            self._closing.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    # -- the trajectory -------------------------------------------------------------------------

    def start(
        self,
        labels: Any,
        noise: Any = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        *,
        seed: int | None = None,
        call_noise: Any = None,
        stream: int | None = None,
    ) -> None:
        """Begin a trajectory, and forget one that is under way.

        Arguments as in :meth:`l2c_export.runtime.Runner.sample`, for exactly ``batch`` labels. Noise
        may lie on the device; it is then not looked at for NaN, since the host would have to wait.
        The host waits for the trajectory before the last, so that there are never more than two.
        """
        self._check_open()
        manifest = self._manifest
        labels = check_labels(manifest, labels)
        if len(labels) != self.batch:
            raise L2CError(f"{len(labels)} labels for a session of batch {self.batch}")
        scale = check_guidance(manifest, guidance_scale)
        draw = noise_source(manifest, self.batch, call_noise, seed)
        inputs: dict[str, Array] = {
            "labels": self._table.labels(labels),
            "guidance_scale": np.array([scale], np.float32),
        }
        if not (taken := on_device(noise, self._device)):
            inputs["start"] = check_noise(manifest, self.batch, noise, seed)
        if "noise" in self._sources:
            inputs["noise"] = self._drawn(draw)
        self._program = ()  # until all is there
        with self._device.current():
            self._staging.send(inputs, self.stream)
            self._follower = stream
            if stream is not None:
                self._device.follow(self.stream, stream)
            if taken:
                self._take(noise)
        self._cached = cached
        self._program = manifest.calls if cached else uncached_program(manifest)
        self._index, self._chunk, self._held = 0, None, {}

    def run(self) -> None:
        """Enqueue the calls that are left; nothing waits for them but the caller's stream.

        The first whole trajectory runs twice: once as a warm-up, and once as a graph, which must do
        the same.

        Raises:
            L2CError: An engine fails, or a captured graph does something else than its engines.
        """
        self._check_started()
        with self._device.current():
            if self._index or self.graphs in ("none", "engine"):
                for index in range(self._index, len(self._program)):
                    self._enqueue(index)
            elif self._cached in self._ready:
                for graph in self._ready[self._cached]:
                    self._device.launch(graph, self.stream)
            else:
                self._prepare()
            while self._index < len(self._program):
                self._advance()
            self._tell_compiled()
            if self._follower is not None:
                self._device.follow(self._follower, self.stream)

    def step(self) -> CallResult:
        """Run the next call and the update of the latent, and wait for it.

        Raises:
            L2CError: No call is left.
        """
        self._check_started()
        index = self._index
        if index == len(self._program):
            raise L2CError("the trajectory is over; begin another with start()")
        with self._device.current():
            self._enqueue(index)
            output = self._fetched("output", self._shape, np.dtype(np.float32))
            self._tell_compiled()
        return CallResult(index, self._program[index].timestep, output, self.x)

    def __iter__(self) -> Iterator[CallResult]:
        """Run the calls that are left."""
        while self._index < len(self._program):
            yield self.step()

    @property
    def x(self) -> Floats:
        """(B, C, H, W) a copy of the latent so far, when the stream gets there."""
        self._check_started()
        with self._device.current():
            return self._fetched(self._latest(), self._shape, np.dtype(np.float32))

    def slot(self, name: str) -> Array:
        """(rows, …) a copy of a stored slot: the rows of the labels, then those of the null label.

        A slot in bfloat16 comes in float32.

        Raises:
            L2CError: Nothing is stored under that name at this point of the trajectory.
        """
        self._check_started()
        if name not in self._held:
            raise L2CError(f"slot {name!r} is not stored after {self._index} calls")
        with self._device.current():
            buffer, dtype = f"slot.{self._held[name]}", self._manifest.slots.dtype
            return from_stored(self._fetched(buffer, self._slot_shape, stored_type(dtype)), dtype)

    def result(self, out: Any = None) -> Any:
        """The latent in device memory, there when the stream of :meth:`start` gets there.

        Args:
            out: (B, C, H, W) float32 on the device, by ``__dlpack__``; without it, a new array.

        Raises:
            L2CError: ``out`` is something else.
        """
        self._check_started()
        if out is not None and not on_device(out, self._device):
            raise L2CError(f"out is not in the memory of {self._device.name}")
        reader, owner = self._follower, None
        if reader is None:
            reader, owner = self.stream, self._stream
        with self._device.current():
            if out is None:
                out = DeviceArray(self._device, self._shape, np.float32, reader, owner)
            if isinstance(out, DeviceArray):
                address = out.checked(self._shape, np.float32, "out")
                if out.stream != self.stream:  # where it may be in use
                    self._device.follow(self.stream, out.stream)
                self._give(address, reader)
                out.filled_on(reader, owner)
            else:
                borrowed = Borrowed(out, self.stream, self._shape, np.float32, "out")
                self._give(borrowed.address, reader)
                if self._follower is None:
                    self._device.synchronize(self.stream)
                borrowed.close()
        return out

    def run_call(
        self, index: int, x: Any, reads: Mapping[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Array]]:
        """Run one call of the started program on given inputs; the trajectory stays where it is.

        As :meth:`l2c_export.runtime.Session.run_call`; slots in bfloat16 go in and out in float32, and
        what goes in is rounded.
        """
        self._check_started()
        if not 0 <= index < len(self._program):
            raise L2CError(f"there is no call {index}; the started program has {len(self._program)}")
        call, given = self._program[index], dict(reads or {})
        if set(given) != set(call.reads):
            raise L2CError(f"call {index} reads {sorted(call.reads)}, not {sorted(given)}")
        dtype = self._manifest.slots.dtype
        arrays = {"x": check_floats(x, self._shape, np.dtype(np.float32), "x")}
        for slot, value in given.items():
            checked = check_floats(value, self._slot_shape, host_type(dtype), f"slot {slot}")
            arrays[slot] = to_stored(checked, dtype)
        results: dict[str, Array] = {"output": np.empty(self._shape, np.float32)}
        results |= {slot: np.empty(self._slot_shape, stored_type(dtype)) for slot in call.writes}
        sizes = {name: array.nbytes for name, array in (arrays | results).items()}
        with self._device.current():
            probe = Arena(self._device, "a single call", sizes)
            try:
                for name, array in arrays.items():
                    self._device.upload(probe[name], np.ascontiguousarray(array), self.stream)
                self._condition(index)
                fixed = self._call_inputs(index)
                self._once = True
                self._network(call, fixed | {name: probe[name] for name in sizes})
                for name, array in results.items():
                    self._device.download(array, probe[name], self.stream)
                self._device.synchronize(self.stream)
            finally:
                self._once = False
                probe.close()
        return results.pop("output"), {s: from_stored(bits, dtype) for s, bits in results.items()}

    # -- what is enqueued -----------------------------------------------------------------------

    def _enqueue(self, index: int) -> None:
        """The next call of the trajectory, and the update after it."""
        if self.graphs == "call" and self._cached in self._ready:
            if index % self._table.calls:
                self._condition(index)
            self._device.launch(self._ready[self._cached][index], self.stream)
        else:
            if index == 0:
                self._begin()
            self._condition(index)
            self._call(index)
        self._advance()

    def _advance(self) -> None:
        """The next call is over, as far as the host is concerned."""
        written = self._program[self._index].writes
        self._held = {s: b for s, b in self._held.items() if b not in written.values()} | written
        self._chunk = self._table.chunk_of(self._index)
        self._index += 1

    def _tell_compiled(self) -> None:
        """After the first whole trajectory of a program all its kernels are there."""
        if self._index == len(self._program) and self._cached not in self._told:
            self._told.add(self._cached)
            self._shared.compiled()

    def _check_open(self) -> None:
        if self._closed:
            raise L2CError("the session is closed; make another")

    def _check_started(self) -> None:
        self._check_open()
        if not self._program:
            raise L2CError("no trajectory was started; begin one with start()")

    # -- copies ---------------------------------------------------------------------------------

    def _take(self, noise: Any) -> None:
        """Copy noise that is on the device already."""
        borrowed = Borrowed(noise, self.stream, self._shape, np.float32, "noise")
        self._device.copy(self._arena["start"], borrowed.address, self._latent_bytes, self.stream)
        if self._follower is None:
            self._device.synchronize(self.stream)
        else:  # what its owner does with the memory next waits for the copy
            self._device.follow(self._follower, self.stream)
        borrowed.close()

    def _give(self, address: int, reader: int) -> None:
        """Copy the latent so far to where a stream will read it."""
        latest = self._arena[self._latest()]
        self._device.copy(address, latest, self._latent_bytes, self.stream)
        if reader != self.stream:
            self._device.follow(reader, self.stream)

    def _latest(self) -> str:
        return self._latest_of(self._index)
