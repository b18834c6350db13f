"""How much two routers agree: a mask that another seed does not find again was chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.schedule import Router
from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Overlap:
    """Two routers at one threshold.

    Attributes:
        both: Sub-layer evaluations that both remove.
        either: Those that at least one removes.
        same: Those on which they agree, of ``routed``.
        routed: Those that at least one decides.
    """

    both: int
    either: int
    same: int
    routed: int

    @property
    def jaccard(self) -> float:
        """What both remove, of what either removes; 1 where neither removes anything."""
        return self.both / self.either if self.either else 1.0

    @property
    def agreement(self) -> float:
        """The share of decisions that are the same."""
        return self.same / self.routed


def mask_overlap(router_a: Router, router_b: Router, threshold: float) -> Overlap:
    """Compare what two routers of the same trajectory remove at a threshold.

    Raises:
        L2CError: They are for different samplers, numbers of calls or sub-layers.
    """
    check_comparable(router_a, router_b)
    a, b = (_removed(router, threshold) for router in (router_a, router_b))
    routed = (router_a.routed | router_b.routed)[:, None] & np.ones_like(a)
    return Overlap(
        both=int((a & b).sum()),
        either=int((a | b).sum()),
        same=int(((a == b) & routed).sum()),
        routed=int(routed.sum()),
    )


def check_comparable(router_a: Router, router_b: Router) -> None:
    """Refuse routers that do not decide the same things.

    Raises:
        L2CError: They are for different samplers, numbers of calls or sub-layers.
    """
    for what, a, b in (
        ("samplers", router_a.sampler, router_b.sampler),
        ("calls", router_a.calls, router_b.calls),
        ("scores a call", router_a.logits.shape[1], router_b.logits.shape[1]),
        ("sub-layers", router_a.slots or router_b.slots, router_b.slots or router_a.slots),
    ):
        if a != b:
            values = "" if what == "sub-layers" else f" ({a} and {b})"
            raise L2CError(
                f"two routers with different {what}{values} cannot be compared; "
                "train them for the same trajectory"
            )


def _removed(router: Router, threshold: float) -> NDArray[np.bool_]:
    """(calls, slots) what the router reuses; a score above the threshold computes."""
    scores = 1.0 / (1.0 + np.exp(-router.logits.astype(np.float64)))
    return ~(scores > threshold) & router.routed[:, None]
