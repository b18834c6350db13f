"""Engines that serve every schedule: the stages of a call, and the engine that each is bound to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from l2c_export.core.bundle import Manifest, Value
from l2c_export.core.schedule import Schedule
from l2c_export.errors import L2CError

CARRIED = "carried."
"""Before the number of a buffer for what stages hand on: the residual stream, and long skips."""


@dataclass(frozen=True)
class Piece:
    """An engine as one stage uses it.

    Attributes:
        engine: Name of its graph in the record; many pieces have the same.
        values: Input, weight or output of the engine to what it is bound to: ``x``, ``output``,
            ``guidance_scale``, a slot, a parameter of ``weights.safetensors``, an output of the
            conditioning engine, or a buffer with :data:`CARRIED` before its number.
    """

    engine: str
    values: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """What a call does between two slots.

    Attributes:
        slot: The slot at its end; empty where that is the model's output.
        compute: Takes the slot before it and gives this one, and what later stages read.
        advance: The same without this slot, for a call that reuses it; None where nothing is left.
    """

    slot: str
    compute: Piece
    advance: Piece | None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Both."""
        return (self.compute,) if self.advance is None else (self.compute, self.advance)

    def piece(self, reuse: bool) -> Piece | None:
        """What a call runs that computes or reuses the slot; the output is never reused."""
        return self.advance if reuse and self.slot else self.compute


def stages_from_json(entries: Iterable[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """What ``dataclasses.asdict`` made of stages, read back.

    Raises:
        KeyError, TypeError: It is something else.
    """
    return tuple(
        Stage(
            entry["slot"],
            Piece(**entry["compute"]),
            None if entry["advance"] is None else Piece(**entry["advance"]),
        )
        for entry in entries
    )


def parameters(weights: Mapping[str, Iterable[Value]], stages: Iterable[Stage]) -> list[Value]:
    """Parameters that engines take as inputs, in the shapes that they take them in; some several times.

    Args:
        weights: Engine to its inputs for weights. Those of one that no stage has are parameters.
        stages: What the inputs of the others are bound to.
    """
    bound = [(piece.engine, piece.values) for stage in stages for piece in stage.pieces]
    served = {engine for engine, _ in bound}
    alone: list[tuple[str, dict[str, str]]] = [(name, {}) for name in weights if name not in served]
    return [
        replace(value, name=names.get(value.name, value.name))
        for engine, names in bound + alone
        for value in weights[engine]
    ]


def carried_values(passed: Mapping[str, Iterable[Value]], stages: Iterable[Stage]) -> dict[str, Value]:
    """Buffer for what stages hand on to what lies in it.

    Args:
        passed: Engine to its inputs and outputs.
        stages: What those are bound to.
    """
    return {
        name: value
        for stage in stages
        for piece in stage.pieces
        for value in passed[piece.engine]
        if (name := piece.values.get(value.name, "")).startswith(CARRIED)
    }


def scheduled(manifest: Manifest, reuse: Any = None) -> Manifest:
    """A manifest for engines of sub-layers: another schedule, and a buffer for every slot.

    Args:
        manifest: The bundle's.
        reuse: (calls, slots) bool, noisiest call first: True reuses what the slot stored last. None is
            the bundle's own schedule.

    Raises:
        L2CError: The schedule has other sizes, or reuses what no earlier call computed.
    """
    names, source = manifest.slots.names, manifest.schedule
    if reuse is None:
        table = np.array([[name in call.reads for name in names] for call in manifest.calls])
    else:
        wanted = (len(manifest.calls), len(names))
        try:
            table = np.asarray(reuse)
        except (TypeError, ValueError) as error:  # rows of several lengths, or a tensor on a device
            raise L2CError(f"the schedule makes no bool array of {wanted}: {error}") from None
        if table.shape != wanted or table.dtype != np.bool_:
            raise L2CError(
                f"the schedule is {table.dtype} {table.shape}; this bundle needs bool {wanted}: "
                "calls and slots, True where a slot is reused"
            )
        removed = int(table.sum())
        source = {"kind": "given at run time", "removed": removed, "asked": removed}
    schedule = Schedule(names, table)
    calls = tuple(
        replace(
            call,
            graph=manifest.uncached,
            reads={name: i for i, name in enumerate(names) if row[i]},
            writes={name: i for i, name in enumerate(names) if not row[i]},
        )
        for call, row in zip(manifest.calls, schedule.reuse, strict=True)
    )
    return replace(manifest, schedule=source, calls=calls, buffers=len(names))
