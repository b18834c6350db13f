"""Which schedule to build: the front of time and drift, and the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from l2c_export.errors import L2CError

Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What the chosen schedule may take, or may differ by.

    Attributes:
        kind: ``"share"`` (of the uncached time), ``"ms"`` (a latent) or ``"drift"`` (relative L2).
        limit: The largest value allowed.
    """

    kind: str
    limit: float

    def __str__(self) -> str:
        return {
            "share": f"{self.limit:g} of the uncached time",
            "ms": f"{self.limit:g} ms a latent",
            "drift": f"a drift of {self.limit:g}",
        }[self.kind]


def on_front(row: Row, rows: Sequence[Row]) -> bool:
    """Whether no other row is as fast and as close, and one of the two more so."""
    at = _time_and_drift(row)
    return not any(
        all(a <= b for a, b in zip(other, at, strict=True)) and other != at
        for other in map(_time_and_drift, rows)
    )


def _time_and_drift(row: Row) -> tuple[float, float]:
    return row["time"]["share"], row["drift"]["mean"]


def choose(rows: Sequence[Row], budget: Budget | None) -> int | None:
    """The row to build: within a budget of time the closest, within a budget of drift the fastest.

    Returns:
        Its index; None without a budget, and where no row keeps it.
    """
    if budget is None:
        return None
    limited, other = _objectives(budget)
    within = [i for i, row in enumerate(rows) if limited(row) <= budget.limit]
    return min(within, key=lambda i: (other(rows[i]), limited(rows[i])), default=None)


def _objectives(budget: Budget) -> tuple[Callable[[Row], float], Callable[[Row], float]]:
    """What the budget limits, and what is least among the rows that keep it."""

    def drift(row: Row) -> float:
        return float(row["drift"]["mean"])

    def share(row: Row) -> float:
        return float(row["time"]["share"])

    if budget.kind == "drift":
        return drift, share
    return (share if budget.kind == "share" else lambda row: float(row["time"]["ms"])), drift


def _rounded_up(value: float) -> float:
    """Four digits, and never less: a budget of the result is one that can be kept."""
    if value <= 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.4g}")


def check_budget(data: dict[str, Any]) -> None:
    """Say what the best is where nothing keeps the budget.

    Raises:
        L2CError: Nothing does.
    """
    if data["budget"] is None or data["chosen"] is not None:
        return
    budget = Budget(**data["budget"])
    limited, _ = _objectives(budget)
    best = min(data["rows"], key=limited)
    value = replace(budget, limit=_rounded_up(limited(best)))
    raise L2CError(
        f"no schedule keeps the budget of {budget}: the best is {best['name']} at "
        f"--threshold {best['threshold']}, with {value}"
    )
