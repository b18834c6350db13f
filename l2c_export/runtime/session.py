"""A session: the buffers of one trajectory, and its calls one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import CONDITIONING, Manifest, ProgramCall, Value
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.backends import Array, LoadedGraph
from l2c_export.runtime.buffers import aligned
from l2c_export.runtime.inputs import (
    check_batch,
    check_floats,
    check_guidance,
    check_labels,
    check_noise,
)
from l2c_export.runtime.noise import NoiseSource, noise_source
from l2c_export.runtime.sampler_state import Floats, SamplerState

_DTYPES = ("float32", "float16", "int64")

# The conditioning of many calls is computed at once, because it reads a third of all weights
# whatever the number of calls. So much of it is kept: 41 calls of DiT-XL/2 with one label and the
# null label.
_TABLE_BYTES = 64 << 20


class Graphs(Protocol):
    """Where a session gets its graphs: the runner."""

    manifest: Manifest

    def graph(self, name: str) -> LoadedGraph:
        """A loaded graph."""


@dataclass(frozen=True)
class CallResult:
    """What a call left behind; the arrays are views of the session's, valid until its next call.

    Attributes:
        index: Of the call; 0 is the noisiest.
        timestep: What the network was told.
        output: (B, C, H, W) the guided model output.
        x: (B, C, H, W) the latent after the call's update.
    """

    index: int
    timestep: float
    output: Floats
    x: Floats


class AnySession(Protocol):
    """What a session of any backend does; :class:`Session` says how."""

    batch: int

    @property
    def x(self) -> Floats:
        """(B, C, H, W) the latent so far."""

    def start(
        self,
        labels: Any,
        noise: Any = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        *,
        seed: int | None = None,
        call_noise: Any = None,
    ) -> None:
        """Begin a trajectory, and forget one that is under way."""

    def run(self) -> None:
        """Run the calls that are left."""

    def step(self) -> CallResult:
        """Run the next call and the update of the latent."""

    def __iter__(self) -> Iterator[CallResult]:
        """Run the calls that are left, one by one."""

    def slot(self, name: str) -> Array:
        """(rows, …) a stored slot."""

    def run_call(
        self, index: int, x: Any, reads: Mapping[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Array]]:
        """Run one call on given inputs; the trajectory stays where it is."""


class StreamSession(AnySession, Protocol):
    """What a session in device memory does besides."""

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
        """Begin a trajectory after what is on the caller's stream."""

    def result(self, out: Any = None) -> Any:
        """The latent in device memory, when the caller's stream gets there."""


class Session:
    """One trajectory at a time, call by call, in buffers of its own; for one thread at a time.

    ::

        session = runner.session(batch=2)  # one that the bundle was built for
        session.start([207, 360], seed=0)
        for call in session:
            print(call.index, call.timestep, call.x.std())
        latents = session.x.copy()

    Attributes:
        batch: B, latents of a trajectory.
        x: (B, C, H, W) the latent: noise after :meth:`start`, the result after the last call.
    """

    def __init__(self, graphs: Graphs, batch: int) -> None:
        manifest = graphs.manifest
        check_batch(manifest, batch)
        self.batch = batch
        self._state = SamplerState(manifest, batch)
        self.x: Floats = self._state.x
        self._manifest = manifest
        self._graphs = graphs
        self._noise: NoiseSource | None = None
        self._guidance: Floats = aligned((1,))
        self._slot_shape = (batch * manifest.rows, *manifest.slots.shape)
        self._slot_dtype = dtype_of(manifest.slots.dtype)
        self._buffers = [aligned(self._slot_shape, self._slot_dtype) for _ in range(manifest.buffers)]
        self._held: dict[str, int] = {}
        self._conditioning = _Conditioning(graphs, batch)
        self._bound: dict[tuple[Any, ...], Callable[[], None]] = {}
        self._program: tuple[ProgramCall, ...] = ()
        self._index = 0

    def start(
        self,
        labels: Any,
        noise: Any = None,
        guidance_scale: float | None = None,
        cached: bool = True,
        *,
        seed: int | None = None,
        call_noise: Any = None,
    ) -> None:
        """Begin a trajectory, and forget one that is under way.

        Arguments as in :meth:`l2c_export.runtime.Runner.sample`, for exactly ``batch`` labels;
        ``call_noise`` may also be a function, see :data:`l2c_export.runtime.noise.NoiseSource`.
        """
        manifest = self._manifest
        labels = check_labels(manifest, labels)
        if len(labels) != self.batch:
            raise L2CError(f"{len(labels)} labels for a session of batch {self.batch}")
        scale = check_guidance(manifest, guidance_scale)
        source = noise_source(manifest, self.batch, call_noise, seed)
        np.copyto(self.x, check_noise(manifest, self.batch, noise, seed))
        self._noise = source
        self._guidance[0] = scale
        self._program = manifest.calls if cached else uncached_program(manifest)
        self._index, self._held = 0, {}
        self._conditioning.start(labels)

    def step(self) -> CallResult:
        """Run the next call and the update of the latent.

        Raises:
            L2CError: No call is left.
        """
        index = self._index
        if index == len(self._program):
            raise L2CError("the trajectory is over; begin another with start()")
        call = self._program[index]
        run = self._bound_call(call)
        self._conditioning.select(index)
        run()
        self._state.apply(index, call.update, self._noise)
        written = call.writes.values()
        self._held = {s: b for s, b in self._held.items() if b not in written} | call.writes
        self._index += 1
        return CallResult(index, call.timestep, self._state.output, self.x)

    def __iter__(self) -> Iterator[CallResult]:
        """Run the calls that are left."""
        while self._index < len(self._program):
            yield self.step()

    def run(self) -> None:
        """Run the calls that are left."""
        for _ in self:
            pass

    def slot(self, name: str) -> Array:
        """(rows, …) view of a stored slot: the rows of the labels, then those of the null label.

        Raises:
            L2CError: Nothing is stored under that name at this point of the trajectory.
        """
        if name not in self._held:
            raise L2CError(f"slot {name!r} is not stored after {self._index} calls")
        return self._buffers[self._held[name]]

    def run_call(
        self, index: int, x: Any, reads: Mapping[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Array]]:
        """Run one call of the started program on given inputs; the trajectory stays where it is.

        Args:
            index: Of the call.
            x: (B, C, H, W) float32.
            reads: Slot to its (rows, …) value, for exactly the slots that the call reads.

        Returns:
            (B, C, H, W) guided model output and the slots that the call writes: new arrays.

        Raises:
            L2CError: There is no such call, or the inputs are not its.
        """
        if not 0 <= index < len(self._program):
            raise L2CError(f"there is no call {index}; the started program has {len(self._program)}")
        call, given = self._program[index], dict(reads or {})
        if set(given) != set(call.reads):
            raise L2CError(f"call {index} reads {sorted(call.reads)}, not {sorted(given)}")
        output: Floats = aligned(self.x.shape)
        writes = {slot: aligned(self._slot_shape, self._slot_dtype) for slot in call.writes}
        run = self._bind(
            call.graph,
            _aligned_copy(check_floats(x, self.x.shape, self.x.dtype, "x")),
            output,
            {
                slot: _aligned_copy(check_floats(v, self._slot_shape, self._slot_dtype, f"slot {slot}"))
                for slot, v in given.items()
            },
            writes,
        )
        self._conditioning.select(index)
        run()
        return output, writes

    def _bound_call(self, call: ProgramCall) -> Callable[[], None]:
        """Bind once; calls with the same graph and buffers share it."""
        key = (call.graph, *call.reads.items(), "->", *call.writes.items())
        if key not in self._bound:
            reads = {slot: self._buffers[b] for slot, b in call.reads.items()}
            writes = {slot: self._buffers[b] for slot, b in call.writes.items()}
            self._bound[key] = self._bind(call.graph, self.x, self._state.output, reads, writes)
        return self._bound[key]

    def _bind(
        self,
        graph: str,
        x: Floats,
        output: Floats,
        reads: Mapping[str, Array],
        writes: Mapping[str, Array],
    ) -> Callable[[], None]:
        conditioning = self._conditioning.rows
        inputs = {"x": x, CONDITIONING: conditioning, "guidance_scale": self._guidance, **reads}
        return _bind(self._graphs, graph, inputs, {"output": output, **writes})


class _Conditioning:
    """What depends on timestep and label alone, computed for as many calls at once as are kept.

    Attributes:
        rows: (rows, K) of the selected call; a fixed address.
    """

    def __init__(self, graphs: Graphs, batch: int) -> None:
        manifest = graphs.manifest
        (value,) = manifest.graphs[CONDITIONING].outputs
        width = tuple(int(size) for size in value.shape[1:])
        dtype = dtype_of(value.dtype)
        self.rows: Array = aligned((batch * manifest.rows, *width), dtype)
        self._graphs = graphs
        self._timesteps = np.array([call.timestep for call in manifest.calls], np.float32)
        self._null = manifest.guidance.null_label if manifest.guidance else None
        self._distinct = np.empty(0, np.int64)
        self._order = np.empty(0, np.intp)
        self._table: Array = np.empty((0, 0, *width), dtype)  # (calls, distinct labels, K)
        self._first = len(self._timesteps)  # call of the table's first row; past the end: not filled

    def start(self, labels: NDArray[np.int64]) -> None:
        """Forget the table. What rows have in common, such as the null label, is computed once."""
        if self._null is not None:
            labels = np.concatenate([labels, np.full_like(labels, self._null)])
        self._distinct, self._order = np.unique(labels, return_inverse=True)
        self._first = len(self._timesteps)
        self.select(0)

    def select(self, index: int) -> None:
        """Fill ``rows`` for a call."""
        if not self._first <= index < self._first + len(self._table):
            self._compute(index)
        # mode="clip" because the default checks the indices in a copy of the output
        np.take(self._table[index - self._first], self._order, axis=0, out=self.rows, mode="clip")

    def _compute(self, first: int) -> None:
        labels, width = len(self._distinct), self.rows.shape[1:]
        at_once = max(1, _TABLE_BYTES // (labels * math.prod(width) * self.rows.itemsize))
        timesteps = self._timesteps[first : first + at_once]
        shape = (len(timesteps), labels, *width)
        if self._table.shape != shape:
            self._table = aligned(shape, self.rows.dtype)
        self._first = len(self._timesteps)
        inputs: dict[str, Array] = {
            "timestep": np.repeat(timesteps, labels),
            "label": np.tile(self._distinct, len(timesteps)),
        }
        outputs = {CONDITIONING: self._table.reshape(-1, *width)}
        _bind(self._graphs, CONDITIONING, inputs, outputs)()
        self._first = first


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a manifest's name for it.

    Raises:
        UnsupportedError: It is not one that numpy has by itself, such as bfloat16.
    """
    if name not in _DTYPES:
        raise UnsupportedError(
            f"this bundle holds {name} values; this runner knows {', '.join(_DTYPES)}"
        )
    return np.dtype(name)


def _aligned_copy(array: Array) -> Array:
    copy = aligned(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


def uncached_program(manifest: Manifest) -> tuple[ProgramCall, ...]:
    """The calls of the manifest, each of which computes everything."""
    return tuple(replace(c, graph=manifest.uncached, reads={}, writes={}) for c in manifest.calls)


def _bind(
    graphs: Graphs, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> Callable[[], None]:
    """Bind what a graph takes and makes; an input that it has no use for is not among them."""
    graph = graphs.manifest.graphs[name]
    return graphs.graph(name).bind(
        {value.name: _offered(name, value, inputs) for value in graph.inputs},
        {value.name: _offered(name, value, outputs) for value in graph.outputs},
    )


def _offered(graph: str, value: Value, arrays: Mapping[str, Array]) -> Array:
    array = arrays.get(value.name)
    if array is None or array.dtype != dtype_of(value.dtype) or not _fits(array.shape, value.shape):
        has = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise L2CError(
            f"graph {graph} has the value {value.name!r} of {value.dtype} {value.shape}, this release "
            f"has {has} for it; build the bundle again or install a matching l2c-export"
        )
    return array


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    """Whether fixed sizes agree; batches have been checked before."""
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )
