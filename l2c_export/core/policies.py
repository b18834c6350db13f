"""Schedules without a trained router: the baselines that a learned schedule has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from l2c_export.core.schedule import Schedule
from l2c_export.errors import L2CError

ANCHORS = ("end", "start")
_SHAPES = "fora:N, fora:N:start, random:SEED and random:SEED:call"


def fora(slots: Sequence[str], calls: int, interval: int, anchor: str = "end") -> Schedule:
    """Compute all in every ``interval``-th call and nothing between (FORA, arXiv 2407.01425).

    Args:
        slots: Slot names in execution order.
        calls: Calls of a trajectory.
        interval: 1 computes everything.
        anchor: Where counting begins. ``"end"`` is the authors' code: the first call computes, and
            every call whose distance from the last is a multiple of the interval. ``"start"`` counts
            from the first call and computes the last as well, as in the FORA schedules that
            SmoothCache's authors released.

    Raises:
        L2CError: The interval or the anchor makes no sense.
    """
    if not 1 <= interval <= calls:
        raise L2CError(f"FORA interval {interval}: with {calls} calls, give 1 to {calls}")
    if anchor not in ANCHORS:
        raise L2CError(f"FORA anchor {anchor!r}: give one of {', '.join(ANCHORS)}")
    ascending = np.arange(calls)
    if anchor == "end":
        computes = (ascending[::-1] % interval == 0) | (ascending == 0)
    else:
        computes = (ascending % interval == 0) | (ascending == calls - 1)
    reuse = np.repeat(~computes[:, None], len(slots), axis=1)
    source = {"kind": "fora", "policy": f"fora:{interval}:{anchor}"}
    return Schedule(tuple(slots), reuse, source)


def random_like(
    schedule: Schedule, seed: int, costs: Mapping[str, int], within: str = "trajectory"
) -> Schedule:
    """Shuffle what a schedule reuses, at the same cost: the "random drop" of L2C's Table 5.

    Entries change places only with entries of slots that cost the same, and only among the calls in
    which the schedule reuses anything, so count and multiply-accumulates stay exactly what they were.

    Args:
        schedule: The learned schedule.
        seed: Of the shuffle.
        costs: Slot to multiply-accumulates, as ``config.slot_macs()``.
        within: ``"trajectory"`` shuffles over calls and blocks; ``"call"`` keeps how much each call
            reuses and shuffles over blocks alone.

    Raises:
        L2CError: ``within`` makes no sense.
    """
    if within not in ("trajectory", "call"):
        raise L2CError(f"random schedule within {within!r}: give 'trajectory' or 'call'")
    generator = np.random.default_rng(seed)
    reuse = schedule.reuse.copy()
    routed = np.flatnonzero(reuse.any(axis=1))
    groups = [routed] if within == "trajectory" else list(routed[:, None])
    for cost in sorted(set(costs.values())):
        columns = [i for i, name in enumerate(schedule.slots) if costs[name] == cost]
        for rows in groups:
            part = np.ix_(rows, np.array(columns))
            reuse[part] = generator.permutation(reuse[part].ravel()).reshape(len(rows), len(columns))
    source = {"kind": "random", "policy": f"random:{seed}:{within}", "like": schedule.source}
    return Schedule(schedule.slots, reuse, source)


@dataclass(frozen=True)
class Policy:
    """A schedule made by hand, as ``--policy`` names it.

    Attributes:
        kind: ``"fora"``, which needs no router, or ``"random"``, which shuffles the router's schedule.
        number: FORA's interval, or the seed.
        option: FORA's anchor, or what is shuffled over.
    """

    kind: str
    number: int
    option: str

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read ``fora:2``, ``fora:3:start``, ``random:0`` or ``random:0:call``.

        Raises:
            L2CError: It is none of these.
        """
        kind, _, rest = text.partition(":")
        number, colon, option = rest.partition(":")
        options = {"fora": ANCHORS, "random": ("trajectory", "call")}.get(kind, ())
        if not colon and options:
            option = options[0]
        if not (number.isascii() and number.isdigit() and len(number) < 10) or option not in options:
            raise L2CError(f"policy {text!r} is unknown; known: {_SHAPES}")
        return cls(kind, int(number), option)
