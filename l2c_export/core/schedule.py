"""A caching schedule: for each call and slot, what to do. It is data, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Router:
    """A trained router in call order, whatever the order of the file it came from.

    Attributes:
        logits: (calls, slots) float32; ``sigmoid(logit)`` is the weight of computing: a
            score above the threshold computes. Rows of calls that are not routed are ignored.
        routed: (calls,) bool; the calls that may reuse. The others compute everything.
        sampler: The sampler it was trained for (``ddim`` …).
        source: Where it came from, for the manifest: file name, SHA-256, format, training options.
        slots: The slots it was trained for, where its file names them.
    """

    logits: NDArray[np.float32]
    routed: NDArray[np.bool_]
    sampler: str
    source: dict[str, Any] = field(default_factory=dict)
    slots: tuple[str, ...] | None = None

    @property
    def calls(self) -> int:
        """Network evaluations of one trajectory."""
        return int(self.logits.shape[0])


@dataclass(frozen=True)
class Schedule:
    """For each call and slot: compute, or reuse what the slot stored last.

    Attributes:
        slots: Slot names in execution order.
        reuse: (calls, slots) bool, noisiest call first; True reuses the last computed output.
        source: How it was made, for the manifest.
    """

    slots: tuple[str, ...]
    reuse: NDArray[np.bool_]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a schedule that reuses what nothing computed."""
        if self.reuse.ndim != 2 or self.reuse.shape[1] != len(self.slots) or not len(self.reuse):
            raise L2CError(
                f"a schedule needs (calls, {len(self.slots)}) entries, got {self.reuse.shape}"
            )
        if self.reuse[0].any():
            first = self.slots[int(np.argmax(self.reuse[0]))]
            raise L2CError(
                f"the schedule reuses slot {first} in the first call, before it was computed"
            )

    @property
    def calls(self) -> int:
        """Network evaluations of one trajectory."""
        return int(self.reuse.shape[0])

    @property
    def removed(self) -> int:
        """Slot evaluations that are reused instead of computed."""
        return int(self.reuse.sum())


def uncached(slots: Sequence[str], calls: int) -> Schedule:
    """The schedule that computes everything."""
    return Schedule(tuple(slots), np.zeros((calls, len(slots)), bool), {"kind": "uncached"})


def threshold_router(
    router: Router, slots: Sequence[str], sampler: str, calls: int, threshold: float
) -> Schedule:
    """Harden a router at a threshold into a static schedule (L2C, arXiv 2406.01733, section 3.3).

    The paper's Algorithm 2 states the comparison the wrong way round; as in the authors' code, a
    slot is computed where ``sigmoid(logit) > threshold`` and reused elsewhere.

    Raises:
        L2CError: The router is for another model, sampler or number of calls, or is not finite.
    """
    name = router.source.get("file", "the router")
    if not 0 <= threshold <= 1:
        raise L2CError(f"threshold {threshold} is outside 0 … 1")
    if router.sampler != sampler:
        raise L2CError(
            f"{name} was trained for the sampler {router.sampler!r}, not {sampler!r}; "
            f"use --sampler {router.sampler}"
        )
    if router.calls != calls:
        raise L2CError(
            f"{name} was trained for {router.calls} calls, not {calls}; use --steps {router.calls}"
        )
    if router.logits.shape[1] != len(slots):
        raise L2CError(
            f"{name} has {router.logits.shape[1]} scores a call, the model has {len(slots)} "
            "sub-layers; they are not for each other"
        )
    if router.slots is not None and router.slots != tuple(slots):
        other = next(name for name, ours in zip(router.slots, slots, strict=True) if name != ours)
        raise L2CError(f"{name} was trained for other sub-layers: it has {other!r}; they do not match")
    if not np.isfinite(router.logits[router.routed]).all():
        raise L2CError(f"{name} has scores that are not finite in calls that it routes")
    reuse = np.zeros(router.logits.shape, bool)
    reuse[router.routed] = ~(routed_scores(router) > threshold)
    source = {"kind": "router", "threshold": threshold, "routed_calls": int(router.routed.sum())}
    return Schedule(tuple(slots), reuse, source | {"router": router.source})


def routed_scores(router: Router) -> NDArray[np.float64]:
    """(routed calls, slots): ``sigmoid(logit)`` of the calls that the router decides."""
    return 1.0 / (1.0 + np.exp(-router.logits[router.routed].astype(np.float64)))
