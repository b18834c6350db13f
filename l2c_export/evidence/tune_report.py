"""A tuning for a terminal: what each threshold removes, takes and drifts."""

from __future__ import annotations

from typing import Any

from l2c_export.core.plan_report import size
from l2c_export.evidence.bench_report import busy
from l2c_export.evidence.tune_choice import Budget, Row

_UNSTEADY = 0.1  # of the predicted time


def tune_table(data: dict[str, Any]) -> str:
    """The report of :func:`l2c_export.evidence.tune.tune`."""
    return "\n".join([*_head(data), "", *_row_lines(data), "", *_end(data)])


def _head(data: dict[str, Any]) -> list[str]:
    machine, uncached = data["machine"], data["uncached"]
    guidance = "without guidance" if data["guidance_scale"] is None else "with guidance"
    weights = ", random weights: no picture of real drift" if data["random_weights"] else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    measured = f"{uncached['ms']['median']:.4g} ms measured, " if uncached["ms"] else ""
    return [
        f"{data['preset'] or data['model']['family']}, {data['calls']} calls of {data['sampler']}, "
        f"batch {data['batch']} {guidance}{weights}",
        f"{machine['cpu']}, {threads}, {machine['backend']}",
        *busy(data),
        f"uncached: {measured}{uncached['predicted_ms']:.4g} ms predicted a latent, "
        f"{uncached['macs'] / 1e9:.4g} G multiply-accumulates",
    ]


def _row_lines(data: dict[str, Any]) -> list[str]:
    lines = [
        f"  {'θ':7} {'removed':>12} {'%':>5} {'MACs':>5} {'graphs':>6} {'caches':>9} {'predicted':>9}"
        f"  {'measured':21} drift"
    ]
    for number, router in enumerate(data["routers"]):
        penalty = "" if router["penalty"] is None else f", λ = {router['penalty']:g}"
        lines.append(f"{router['name']}{penalty}")
        lines += [_row_line(row) for row in data["rows"] if row["router"] == number]
    return lines


def _drift(value: float, digits: int = 1) -> str:
    """With four places; smaller values in few characters, ``digits`` of them after the first."""
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.{digits}e}"


def _row_line(row: Row) -> str:
    mark = ">" if row["chosen"] else "*" if row["front"] else " "
    removed = f"{row['removed']} of {row['routed']}"
    return (
        f"{mark} {row['threshold']!s:7} {removed:>12} {100 * row['removed_share']:5.1f} "
        f"{100 * row['macs_share']:5.1f} {row['graphs']:6} {size(row['cache_bytes']):>9} "
        f"{100 * row['predicted']['share']:9.1f}  {_measured(row):21} "
        f"{_drift(row['drift']['mean'])} ± {_drift(row['drift']['standard_error'], 0)}"
    )


def _measured(row: Row) -> str:
    if row["measured"] is None:
        return "-"
    low, middle, high = (100 * row["measured"]["share"][key] for key in ("p10", "median", "p90"))
    return f"{middle:.1f} ({low:.1f} … {high:.1f})"


def _end(data: dict[str, Any]) -> list[str]:
    chosen, measured = data["chosen"], ""
    if data["repeats"]:
        measured = f";\nmeasured: median (p10 … p90) of {data['repeats']} repeats, each beside uncached"
    lines = [
        f"* nothing else is both faster and nearer to uncached{'' if chosen is None else '; > chosen'}",
        f"MACs, predicted and measured time: % of the uncached trajectory's{measured}",
        f"drift: relative L2 of the final latent against uncached from the same noise; mean of "
        f"{data['samples']} ± its\nstandard error, seed {data['seed']}",
        "",
    ]
    lines += _disagreement(data["rows"])
    if chosen is not None:
        return [
            *lines,
            _choice(data["rows"][chosen], Budget(**data["budget"])),
            f"next: {data['next']}",
        ]
    if data["budget"] is None:
        lines.append("next: choose with --latency-budget or --drift-budget; nothing is measured again")
    return lines


def _disagreement(rows: list[Row]) -> list[str]:
    """A warning where a measured time is far from what the step graphs make likely."""
    off = [abs(row["time"]["share"] / row["predicted"]["share"] - 1) for row in rows]
    if max(off) < _UNSTEADY:
        return []
    return [
        f"the measured times are up to {100 * max(off):.0f} % off the predicted ones: "
        "leave the machine to this work,",
        "or take more --repeats",
        "",
    ]


def _choice(row: Row, budget: Budget) -> str:
    time, drift = row["time"], row["drift"]["mean"]
    return (
        f"within {budget}: {row['name']} at θ = {row['threshold']}: {time['ms']:.4g} ms a latent, "
        f"{100 * time['share']:.1f} % of uncached; drift {_drift(drift)}"
    )
