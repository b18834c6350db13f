"""What a router's threshold buys: the table printed at the end of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l2c_export.core.models import ModelConfig
from l2c_export.core.overlap import mask_overlap
from l2c_export.core.plan import make_plan
from l2c_export.core.samplers import model_table
from l2c_export.core.schedule import Router, threshold_router

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SweepRow:
    """A router at one threshold.

    Attributes:
        threshold: A sub-layer is computed where its score is above it.
        removed: Sub-layer evaluations reused in one trajectory.
        routed: Sub-layer evaluations that the router decides.
        macs_ratio: Multiply-accumulates of the trajectory over those without a cache.
        graphs: Distinct step graphs.
        overlap: With another router: what both remove, of what either removes.
        agreement: With another router: the share of decisions that are the same.
    """

    threshold: float
    removed: int
    routed: int
    macs_ratio: float
    graphs: int
    overlap: float | None = None
    agreement: float | None = None


def sweep(
    router: Router,
    config: ModelConfig,
    thresholds: Sequence[float] = THRESHOLDS,
    other: Router | None = None,
) -> list[SweepRow]:
    """Harden a router at each threshold and plan it, with guidance; compare it with another."""
    routed = int(router.routed.sum()) * len(config.slots)
    calls = model_table(router.sampler, router.calls, config)
    rows = []
    for threshold in thresholds:
        schedule = threshold_router(router, config.slots, router.sampler, router.calls, threshold)
        plan = make_plan(config, schedule, calls)
        ratio = plan.costs.total_macs / plan.costs.uncached_macs
        masks = None if other is None else mask_overlap(router, other, threshold)
        rows.append(
            SweepRow(
                threshold,
                schedule.removed,
                routed,
                ratio,
                len(plan.graphs),
                None if masks is None else masks.jaccard,
                None if masks is None else masks.agreement,
            )
        )
    return rows


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """The rows as text, for a terminal."""
    compared = rows[0].overlap is not None
    lines = ["threshold   removed of routed   share    MACs   graphs"]
    if compared:
        lines[0] += "   in both of either   decided alike"
    for row in rows:
        line = f"{row.threshold:9.2f}   {row.removed:7d} of {row.routed:6d}   "
        line += f"{row.removed / row.routed:5.1%}   {row.macs_ratio:5.1%}   {row.graphs:6d}"
        lines.append(f"{line}   {row.overlap:17.1%}   {row.agreement:13.1%}" if compared else line)
    return "\n".join(lines)
