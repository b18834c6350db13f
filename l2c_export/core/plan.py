"""From a schedule to a program: liveness, shared graphs, buffers and what it all costs.

A call writes a slot only if a later call reads it before it is computed again; calls with the same
reads and writes share a graph; buffers are handed out like registers. The pairs of L2C are a special
case: a value may live over any number of calls.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.models import ModelConfig
from l2c_export.core.precision import FLOAT32, Precision, stored_tensors
from l2c_export.core.samplers import Call
from l2c_export.core.schedule import Schedule
from l2c_export.errors import L2CError

# What reading or writing one byte costs in multiply-accumulates, to weigh merging graphs by writing
# more against merging by computing more: about 17 on two AVX-512 cores, 30 to 60 on GPUs.
_MACS_PER_BYTE = 30

# Graphs that differ in their writes alone are merged while all merges together add less than this
# share of the trajectory: a graph less is an engine less to build, ship and load.
_FREE = 0.005


@dataclass(frozen=True)
class StepGraph:
    """One distinct call: what its graph takes, emits and computes.

    Attributes:
        reads: Slots that are inputs, in execution order; every other slot is computed.
        writes: Slots that are outputs, in execution order.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that name the graph by its content."""
        text = f"{' '.join(self.reads)};{' '.join(self.writes)}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name in the manifest and, with ``.onnx``, on disk."""
        return f"step-{self.key}"


@dataclass(frozen=True)
class PlannedCall:
    """One call of the trajectory, bound to a graph and to buffers.

    Attributes:
        call: Its timestep and update.
        graph: The step graph that it runs.
        reads: Slot to the buffer that is bound as input.
        writes: Slot to the buffer that is bound as output; never one that the call reads.
    """

    call: Call
    graph: StepGraph
    reads: dict[str, int]
    writes: dict[str, int]


@dataclass(frozen=True)
class Costs:
    """What a plan costs. MACs are for one latent, guidance rows included.

    Attributes:
        call_macs: (calls,) multiply-accumulates of each call, without the conditioning.
        conditioning_macs: Multiply-accumulates of the conditioning of all calls together.
        full_macs: Of one call that computes everything, without the conditioning.
        weight_bytes: Of all parameters, once.
        copied_weight_bytes: If every distinct graph carried its own copy of what it uses.
        slot_bytes: One slot's value for one latent.
        buffer_bytes: All cache buffers for one latent.
    """

    call_macs: tuple[int, ...]
    conditioning_macs: int
    full_macs: int
    weight_bytes: int
    copied_weight_bytes: int
    slot_bytes: int
    buffer_bytes: int

    @property
    def total_macs(self) -> int:
        """Of a cached trajectory."""
        return sum(self.call_macs) + self.conditioning_macs

    @property
    def uncached_macs(self) -> int:
        """Of a trajectory that computes everything."""
        return len(self.call_macs) * self.full_macs + self.conditioning_macs

    @property
    def speedup(self) -> float:
        """The ideal: uncached over cached multiply-accumulates."""
        return self.uncached_macs / self.total_macs


@dataclass(frozen=True)
class Plan:
    """A schedule compiled for a model: the calls as they will run.

    Attributes:
        config: The model.
        schedule: What the plan computes; where a budget merged graphs it computes more than asked.
        asked: The schedule before merging.
        calls: In execution order, noisiest first.
        buffers: Cache buffers that a session needs; all have the slot's shape.
        guidance: Whether a call evaluates a conditional and an unconditional row for each latent.
        costs: What it costs.
        precision: What its graphs compute in, and its weights and slots are stored in.
        sampler: Name of the sampler; its numbers are in the calls.
    """

    config: ModelConfig
    schedule: Schedule
    asked: Schedule
    calls: tuple[PlannedCall, ...]
    buffers: int
    guidance: bool
    costs: Costs
    precision: Precision = FLOAT32
    sampler: str = ""

    @property
    def graphs(self) -> tuple[StepGraph, ...]:
        """Distinct step graphs in the order of their first use."""
        return tuple(dict.fromkeys(call.graph for call in self.calls))


def make_plan(
    config: ModelConfig,
    schedule: Schedule,
    calls: tuple[Call, ...],
    *,
    guidance: bool = True,
    max_graphs: int | None = None,
    precision: Precision = FLOAT32,
    sampler: str = "",
) -> Plan:
    """Compile a schedule.

    Args:
        config: The model whose slots the schedule names.
        schedule: (calls, slots) of compute and reuse.
        calls: The sampler's table, as long as the schedule.
        guidance: Whether each latent has two rows.
        max_graphs: At most so many distinct step graphs; merges by computing or writing more than
            asked, never less.
        precision: Of weights and slots.
        sampler: Name of the sampler that made ``calls``.

    Raises:
        L2CError: The schedule does not fit the model or the sampler, or the budget is below 1.
    """
    if schedule.slots != config.slots:
        raise L2CError(
            f"the schedule has {len(schedule.slots)} slots, the model {len(config.slots)}; they differ"
        )
    if schedule.calls != len(calls):
        raise L2CError(f"the schedule has {schedule.calls} calls, the sampler {len(calls)}")
    if max_graphs is not None and max_graphs < 1:
        raise L2CError(f"--max-graphs {max_graphs}: a plan needs at least one graph")
    rows = 2 if guidance else 1
    slot_bytes = rows * int(np.prod(config.slot_shape)) * precision.slot_value_bytes
    merged, writes = _merge(schedule.reuse, config, rows, slot_bytes, max_graphs)
    final = Schedule(schedule.slots, merged, schedule.source)
    graphs = [_graph(config.slots, reads, out) for reads, out in zip(merged, writes, strict=True)]
    bound, buffers = _allocate(graphs)
    planned = tuple(
        PlannedCall(call, graph, reads, out)
        for call, graph, (reads, out) in zip(calls, graphs, bound, strict=True)
    )
    costs = _costs(config, graphs, rows, precision, slot_bytes, buffers)
    return Plan(config, final, schedule, planned, buffers, guidance, costs, precision, sampler)


def live_writes(reuse: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(calls, slots): where a computed value is read by a later call before it is computed again."""
    writes = np.zeros_like(reuse)
    needed = np.zeros(reuse.shape[1], bool)
    for i in reversed(range(len(reuse))):
        writes[i] = needed & ~reuse[i]
        needed = (needed & ~writes[i]) | reuse[i]
    return writes


def _graph(slots: tuple[str, ...], reads: NDArray[np.bool_], writes: NDArray[np.bool_]) -> StepGraph:
    return StepGraph(tuple(itertools.compress(slots, reads)), tuple(itertools.compress(slots, writes)))


def _allocate(graphs: list[StepGraph]) -> tuple[list[tuple[dict[str, int], dict[str, int]]], int]:
    """Hand out buffers; one that a call reads is free only after that call."""
    last_read: dict[tuple[int, str], int] = {}  # (writing call, slot) -> last call that reads it
    writer: dict[str, int] = {}
    for i, graph in enumerate(graphs):
        for name in graph.reads:
            last_read[writer[name], name] = i
        writer |= dict.fromkeys(graph.writes, i)
    free: list[int] = []
    buffers = 0
    held: dict[str, int] = {}
    expiry: dict[int, list[int]] = {}
    bound = []
    for i, graph in enumerate(graphs):
        reads = {name: held[name] for name in graph.reads}
        writes = {}
        for name in graph.writes:
            if not free:
                free.append(buffers)
                buffers += 1
            writes[name] = free.pop(0)
            expiry.setdefault(last_read.get((i, name), i), []).append(writes[name])
        held |= writes
        free = sorted(free + expiry.pop(i, []))
        bound.append((reads, writes))
    return bound, buffers


def _costs(
    config: ModelConfig,
    graphs: list[StepGraph],
    rows: int,
    precision: Precision,
    slot_bytes: int,
    buffers: int,
) -> Costs:
    owned: dict[str, int] = {}
    for stored in stored_tensors(config, precision).values():
        owner = config.parameter_owner(stored.parameter)
        owned[owner] = owned.get(owner, 0) + stored.nbytes

    def used(graph: StepGraph) -> int:
        return sum(owned.values()) - sum(owned[name] for name in graph.reads)

    return Costs(
        call_macs=tuple(rows * config.call_macs(graph.reads) for graph in graphs),
        conditioning_macs=len(graphs) * rows * config.conditioning_macs(),
        full_macs=rows * config.call_macs(),
        weight_bytes=sum(owned.values()),
        copied_weight_bytes=sum(used(graph) for graph in dict.fromkeys(graphs)),
        slot_bytes=slot_bytes,
        buffer_bytes=buffers * slot_bytes,
    )


def _merge(
    reuse: NDArray[np.bool_], config: ModelConfig, rows: int, slot_bytes: int, budget: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Merge the cheapest pair of graphs while that is almost free, or the budget asks for it.

    Two graphs become one that computes what either computes and writes what either writes. A slot
    that is computed where the schedule reused it is fresher, never staler, for the calls after it.
    Without a budget only writing is ever added, and less than ``_FREE`` of the trajectory in all.

    Returns:
        (calls, slots) reuse and writes.
    """
    macs = np.array([config.slot_macs()[name] for name in config.slots], np.float64) * rows
    write_macs = slot_bytes * _MACS_PER_BYTE

    def cost(masks: NDArray[np.bool_], writes: NDArray[np.bool_]) -> float:
        return float(((~masks) @ macs).sum()) + float(writes.sum()) * write_macs

    masks, writes = reuse, live_writes(reuse)
    group = _groups(zip(masks, writes, strict=True))
    start = cost(masks, writes)
    while count := int(group.max()):
        over_budget = budget is not None and count >= budget
        computing, writing = _added(masks, writes, group, macs)
        allowed = np.triu(np.ones_like(computing, bool) if over_budget else computing == 0, k=1)
        if not allowed.any():
            break
        price = np.where(allowed, computing + writing * write_macs, np.inf)
        a, b = np.unravel_index(int(price.argmin()), price.shape)
        trial = _apply(reuse, np.where(group == b, a, group))
        if not over_budget and cost(*trial) > start * (1 + _FREE):
            break
        masks, writes = trial
        group = _groups(zip(masks, writes, strict=True))
    return masks, writes


def _added(
    masks: NDArray[np.bool_],
    writes: NDArray[np.bool_],
    group: NDArray[np.int64],
    macs: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(groups, groups) what merging two groups adds: MACs computed, and slots written."""
    first = [int(np.argmax(group == g)) for g in range(int(group.max()) + 1)]
    reads, out = masks[first].astype(np.float64), writes[first].astype(np.float64)
    calls = np.bincount(group)[:, None]
    lost = calls * ((reads * macs) @ (1 - reads).T)  # what a group can no longer reuse
    gained = calls * ((1 - out) @ out.T)  # what it must write for the other
    return lost + lost.T, gained + gained.T


def _apply(
    reuse: NDArray[np.bool_], group: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(calls, slots) reuse and writes when the calls of a group share one graph."""
    masks = reuse.copy()
    for g in np.unique(group):
        masks[group == g] = reuse[group == g].all(axis=0)
    writes = live_writes(masks)
    for g in np.unique(group):
        writes[group == g] = writes[group == g].any(axis=0)
    return masks, writes


def _groups(pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> NDArray[np.int64]:
    """(calls,) number of the distinct graph of each call."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(r.tobytes() + w.tobytes(), len(seen)) for r, w in pairs], np.int64)
