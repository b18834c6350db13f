"""What a tuning found out, as JSON: a row for each router and threshold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from l2c_export.core.plan_report import schedule_json
from l2c_export.evidence.bench import spread
from l2c_export.evidence.tune_choice import Row
from l2c_export.evidence.tune_costs import CostModel
from l2c_export.evidence.tune_measure import Effort, Record
from l2c_export.evidence.tune_schedules import Contender, Contest


def tune_rows(
    contest: Contest, costs: CostModel, effort: Effort, records: Mapping[str, Record]
) -> list[Row]:
    """A row for each contender, in their order.

    Times are in milliseconds a latent; shares are of the uncached trajectory; cache bytes are those of
    a session of ``effort.batch`` latents. ``time`` is measured, or predicted where nothing was.
    """
    return [
        _row(contest, contender, costs, effort, records[contender.key])
        for contender in contest.contenders
    ]


def uncached_json(
    contest: Contest, costs: CostModel, effort: Effort, records: Mapping[str, Record]
) -> dict[str, Any]:
    """The same of the trajectory that everything is compared with."""
    return {
        "macs": contest.uncached.costs.uncached_macs,
        "predicted_ms": 1e3 * costs.seconds(contest.uncached) / effort.batch,
        "ms": _ms((pair[1] for record in records.values() for pair in record.times), effort),
    }


def _row(
    contest: Contest, contender: Contender, costs: CostModel, effort: Effort, record: Record
) -> Row:
    plan, schedule = contender.plan, schedule_json(contender.plan)
    seconds, base = costs.seconds(plan), costs.seconds(contest.uncached)
    predicted = {"ms": 1e3 * seconds / effort.batch, "share": seconds / base}
    measured = _measured(record, effort)
    return {
        "router": contender.router,
        "name": contest.label(contender.router),
        "threshold": contender.threshold,
        "same_thresholds": list(contender.same),
        "removed": schedule["removed"],
        "routed": schedule["routed"],
        "removed_share": schedule["removed_of_routed"],
        "macs": plan.costs.total_macs,
        "macs_share": plan.costs.total_macs / plan.costs.uncached_macs,
        "graphs": len(plan.graphs),
        "cache_bytes": plan.costs.buffer_bytes * effort.batch,
        "predicted": predicted,
        "measured": measured,
        "time": {key: measured[key]["median"] for key in predicted} if measured else predicted,
        "drift": _drift(record, effort),
    }


def _measured(record: Record, effort: Effort) -> dict[str, Any] | None:
    if not effort.repeats:
        return None
    times = record.times[: effort.repeats]  # there may be more, of an earlier tuning
    return {
        "ms": _ms((cached for cached, _ in times), effort),
        "share": spread([cached / uncached for cached, uncached in times]),
    }


def _ms(seconds: Iterable[float], effort: Effort) -> dict[str, float] | None:
    values = [1e3 * each / effort.batch for each in seconds]
    return spread(values) if values else None


def _drift(record: Record, effort: Effort) -> dict[str, float]:
    """Over all latents: the mean relative L2, its standard error, and the largest max|a-b|/max|b|."""
    rounds = [str(number) for number in range(effort.rounds)]
    l2 = np.array([value for number in rounds for value in record.l2[number]])
    error = float(l2.std(ddof=1) / np.sqrt(len(l2))) if len(l2) > 1 else 0.0
    largest = max(value for number in rounds for value in record.largest[number])
    return {"mean": float(l2.mean()), "standard_error": error, "max": largest}
