"""The shape of a trained schedule: which calls a router decides, and where a training with data starts.

A routed call reuses what each slot stored last. So the routed calls say everything: where a call that
computes everything lies before each of them, they are L2C's pairs; where all but the first are routed,
a value may live over any number of calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from l2c_export.core.samplers import SAMPLERS, Call, sampler_table
from l2c_export.errors import L2CError

SCHEDULES = ("pairs", "every")


@dataclass(frozen=True)
class Shape:
    """What a router for a sampler decides.

    Attributes:
        calls: Calls of a trajectory.
        routed: Those that the router decides, ascending; one row of scores for each.
        origins: For each of them the call from which a training with data comes there, computing
            everything on the way; None where the solver keeps a history that data do not give, or
            where what is reused may be of any age.
    """

    calls: int
    routed: tuple[int, ...]
    origins: tuple[int, ...] | None


def make_shape(schedule: str, sampler: str, calls: int) -> Shape:
    """Find the routed calls of a schedule.

    ``pairs`` is L2C's (arXiv 2406.01733): every second call reuses the one before it. A solver step of
    several calls needs the difference of two outputs, so there the step's first call alone is routed,
    and reuses the last call of the step before (the shifted cache of appendix B.1). ``every`` routes
    all calls but the first, as HarmoniCa does (arXiv 2410.01723).

    Raises:
        L2CError: There is no such schedule or sampler, or they do not fit the number of calls.
    """
    if schedule not in SCHEDULES:
        raise L2CError(f"--schedule {schedule!r} is unknown; use one of: {', '.join(SCHEDULES)}")
    starts = _starts(sampler_table(sampler, calls))
    if schedule == "every":
        if calls < 2:
            raise L2CError(f"--steps {calls}: the first call can reuse nothing; use 2 or more")
        return Shape(calls, tuple(range(1, calls)), None)
    if (step := SAMPLERS[sampler].calls_per_step) > 1:
        if len(starts) < 2:
            least = step + 1 if sampler == "dpm-solver-3s" else 2 * step  # its last steps are shorter
            raise L2CError(
                f"--steps {calls}: {sampler} makes one solver step of them, and the second is the "
                f"first to reuse anything; use {least} or more"
            )
        return Shape(calls, starts[1:], starts[:-1])
    if calls < 2 or calls % 2:
        raise L2CError(
            f"--steps {calls}: the calls of {sampler} are taken in pairs, so their number must be "
            f"even; use {calls + calls % 2}"
        )
    routed = tuple(range(1, calls, 2))
    origins = tuple(call - 1 for call in routed)
    return Shape(calls, routed, origins if set(origins) <= set(starts) else None)


def _starts(table: tuple[Call, ...]) -> tuple[int, ...]:
    """The calls that need the latent alone: where the sampler reads nothing that it kept."""
    alone = {"x", "output", "noise"}
    return tuple(i for i, call in enumerate(table) if set().union(*call.update.values()) <= alone)
