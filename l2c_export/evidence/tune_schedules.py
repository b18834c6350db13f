"""What a tuning compares: routers at thresholds, each planned, and equal programs found out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import numpy as np

from l2c_export.build.schedule_options import ScheduleOptions, plan_schedule, router_from_options
from l2c_export.core.files import key_of
from l2c_export.core.models import ModelConfig
from l2c_export.core.plan import Plan
from l2c_export.core.schedule import Router, routed_scores, threshold_router, uncached
from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Contender:
    """A router at a threshold.

    Attributes:
        router: Which one, by its place in :attr:`Contest.routers`.
        threshold: The least of those that give this program.
        same: The other thresholds that were asked for and give the same program.
        plan: What it makes of the model and the sampler.
    """

    router: int
    threshold: float
    same: tuple[float, ...]
    plan: Plan

    @property
    def key(self) -> str:
        """Content key of the program: equal for equal calls, whatever router they come from."""
        return program_key(self.plan)


@dataclass(frozen=True)
class Contest:
    """Everything that is compared.

    Attributes:
        routers: The files, in the order that they were given in.
        contenders: By router, then by threshold.
        uncached: The plan that computes everything.
    """

    routers: tuple[Router, ...]
    contenders: tuple[Contender, ...]
    uncached: Plan

    def label(self, router: int) -> str:
        """The router's file name; with its number where two files have one name."""
        names = [str(r.source.get("file", "router")) for r in self.routers]
        name = names[router]
        return name if names.count(name) == 1 else f"{name} ({router + 1})"

    def penalty(self, router: int) -> float | None:
        """The weight λ of the penalty on computing in the router's training, where its file has it."""
        value = self.routers[router].source.get("training", {}).get("l1")
        return float(value) if isinstance(value, int | float) else None


def make_contest(
    options: ScheduleOptions,
    routers: Sequence[Path],
    thresholds: Sequence[float] | None,
    points: int,
) -> Contest:
    """Read the routers and plan each at each threshold.

    Args:
        options: Model, sampler, batch and budget of graphs.
        routers: Files; none takes the released router of the preset.
        thresholds: For all routers; None takes each router's own, see :func:`own_thresholds`.
        points: So many of a router's own thresholds.

    Raises:
        L2CError: A router does not fit the model or the sampler, or two of them do not fit each other.
    """
    config = options.config
    files = routers or (None,)
    read = [router_from_options(replace(options, router=file), config) for file in files]
    _check_alike(read)
    contenders = [
        contender
        for number, router in enumerate(read)
        for contender in _contenders(options, config, number, router, thresholds, points)
    ]
    everything = plan_schedule(options, config, uncached(config.slots, read[0].calls))
    return Contest(tuple(read), tuple(contenders), everything)


def _check_alike(routers: Sequence[Router]) -> None:
    """Refuse routers whose trajectories could not be compared."""
    first = routers[0]
    for other in routers[1:]:
        if (other.sampler, other.calls) != (first.sampler, first.calls):
            said = [
                f"{r.source.get('file')} for {r.calls} calls of {r.sampler}" for r in (first, other)
            ]
            raise L2CError(
                f"the routers are for different trajectories: {', '.join(said)}; tune one alone"
            )


def _contenders(
    options: ScheduleOptions,
    config: ModelConfig,
    number: int,
    router: Router,
    thresholds: Sequence[float] | None,
    points: int,
) -> Iterable[Contender]:
    """One for each distinct program of a router, from least removed to most."""
    calls = options.steps or router.calls

    def planned(threshold: float) -> Plan:
        schedule = threshold_router(router, config.slots, options.sampler_name, calls, threshold)
        return plan_schedule(options, config, schedule)

    chosen = own_thresholds(router, points) if thresholds is None else sorted(set(thresholds))
    if not chosen:
        planned(0.0)  # says why, if the router does not fit
        raise L2CError(f"{router.source.get('file', 'the router')} decides nothing: it routes no call")
    found: dict[str, list[tuple[float, Plan]]] = {}
    for threshold in chosen:
        plan = planned(threshold)
        found.setdefault(program_key(plan), []).append((threshold, plan))
    for (threshold, plan), *others in found.values():
        yield Contender(number, threshold, tuple(t for t, _ in others), plan)


def own_thresholds(router: Router, points: int) -> list[float]:
    """Thresholds at which a router removes evenly more, up to all that it may remove.

    A threshold matters only by the scores that it lies between, so of each interval between two
    neighbouring scores the shortest decimal number stands for all.

    Returns:
        Ascending; at most ``points``, fewer where the router has fewer distinct scores.
    """
    scores, counts = np.unique(routed_scores(router), return_counts=True)
    if not len(scores):
        return []
    removed = np.cumsum(counts)  # at a threshold of that score
    wanted = np.arange(1, points + 1) * (removed[-1] / points)
    nearest = np.unique([int(np.argmin(np.abs(removed - count))) for count in wanted])
    ends = [*scores.tolist(), np.inf]
    return [shortest_decimal(ends[k], ends[k + 1]) for k in nearest]


def shortest_decimal(low: float, high: float) -> float:
    """The number with the fewest decimals in low <= number < high."""
    for digits in range(1, 26):  # below the 28 digits of Decimal's context
        above = float(Decimal(low).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING))
        for number in (round(low, digits), above):
            if low <= number < high:
                return number
    return low


def program_key(plan: Plan) -> str:
    """Content key of a plan's calls: graphs, timesteps and updates."""
    return key_of([[c.graph.name, c.call.timestep, c.call.update] for c in plan.calls])
