"""What engines will cost, before any is built: device memory, and what the alternative would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from l2c_export.core.bundle import CONDITIONING, Manifest, Value
from l2c_export.core.sublayers import Stage, carried_values, parameters
from l2c_export.engines.network import Network

_ITEM_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}  # of what numpy has no types for

_TABLE_BYTES = 64 << 20  # so much of the conditioning is kept, which one run computes for many calls


@dataclass(frozen=True)
class Price:
    """Bytes of device memory at the largest batch, without scratch and code, which a build tells.

    Attributes:
        engines: How many there are.
        weights: The one copy of what engines take as inputs.
        constants: Weights inside of engines, added up.
        separate: Weights of all engines added up, if each held its own.
        caches: The buffers of stored slots.
        state: Latents, histories, the noise of all calls and the conditioning.
        runs: Engines that a call runs at most, the sampler's update among them.
    """

    engines: int
    weights: int
    constants: int
    separate: int
    caches: int
    state: int
    runs: int = 2

    @property
    def total(self) -> int:
        """All that is known before anything is built."""
        return self.weights + self.constants + self.caches + self.state


def price(manifest: Manifest, networks: Mapping[str, Network]) -> Price:
    """Add up what the engines of a bundle need.

    Args:
        manifest: The bundle's.
        networks: Of all engines, by the names of their graphs.
    """
    shared = {value.name: value for network in networks.values() for value in network.weights}
    constants = _sum(value for network in networks.values() for value in network.constants)
    sizes = largest_sizes(manifest)
    (row,) = manifest.graphs[CONDITIONING].outputs
    latents = [v for n in networks.values() for v in (*n.inputs, *n.outputs) if "batch" in v.shape]
    return Price(
        engines=len(networks),
        weights=_sum(shared.values()),
        constants=constants,
        separate=_sum(v for n in networks.values() for v in n.weights) + constants,
        caches=manifest.buffers * _slot_bytes(manifest),
        state=value_bytes(row, sizes)
        + sum(
            value_bytes(v, sizes) * (len(manifest.calls) if v.name == "noise" else 1)
            for v in {v.name: v for v in latents}.values()
        ),
    )


def price_sublayers(
    manifest: Manifest, whole: Price, networks: Mapping[str, Network], stages: tuple[Stage, ...]
) -> Price:
    """The same for an engine for each kind of sub-layer: every slot has a buffer, as any may be reused.

    Args:
        manifest: The bundle's.
        whole: The price of an engine for each step graph.
        networks: Of the sub-layers' engines, of the conditioning and of the update.
        stages: How a call runs them.
    """
    weights = parameters({name: network.weights for name, network in networks.items()}, stages)
    passed = {name: (*network.inputs, *network.outputs) for name, network in networks.items()}
    handed_on = carried_values(passed, stages).values()
    constants = _sum(value for network in networks.values() for value in network.constants)
    once = _sum({value.name: value for value in weights}.values())
    sizes = largest_sizes(manifest)
    return replace(
        whole,
        engines=len(networks),
        weights=once,
        constants=constants,
        separate=once + constants,
        caches=len(manifest.slots.names) * _slot_bytes(manifest),
        state=whole.state + sum(value_bytes(value, sizes) for value in handed_on),
        runs=len(stages) + 1,
    )


def _slot_bytes(manifest: Manifest) -> int:
    slot = Value("slot", manifest.slots.dtype, ("rows", *manifest.slots.shape))
    return value_bytes(slot, largest_sizes(manifest))


def largest_sizes(manifest: Manifest) -> dict[str, int]:
    """The largest size of every dimension that varies.

    ``n``, the rows that one run of the conditioning takes, are those of a whole trajectory where
    that is no more than 64 MiB, and else of as many calls as that holds.
    """
    (row,) = manifest.graphs[CONDITIONING].outputs
    rows = manifest.batch[1] * manifest.rows
    calls = min(len(manifest.calls), _TABLE_BYTES // (rows * value_bytes(row, {"n": 1})))
    return {"batch": manifest.batch[1], "rows": rows, "n": rows * max(1, calls)}


def value_bytes(value: Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a tensor with these sizes for its dimensions."""
    return math.prod(value.sized(sizes)) * (
        _ITEM_BYTES.get(value.dtype) or np.dtype(value.dtype).itemsize
    )


def _sum(parameters: Iterable[Value]) -> int:
    return sum(value_bytes(value, {}) for value in parameters)
