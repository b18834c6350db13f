"""The quality table as text, its comparisons at equal cost and of precisions, and its plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2c_export.core.files import replacing


@dataclass(frozen=True)
class Row:
    """One method at one setting.

    Attributes:
        family: Of the model.
        method: ``uncached``, ``L2C``, ``random`` or ``FORA``.
        setting: The rest of its name.
        removed: Sub-layer evaluations reused in one trajectory.
        macs: Multiply-accumulates of an image, of the reference's.
        seconds: Time of an image, of the reference's: one ratio for each repeat.
        distance: Fréchet distance, for each seed.
        accuracy: Share of samples in the class that was asked for, for each seed.
        drift: Root mean square change against the reference's samples, for each seed.
    """

    family: str
    method: str
    setting: str
    removed: int
    macs: float
    seconds: tuple[float, ...]
    distance: tuple[float, ...]
    accuracy: tuple[float, ...]
    drift: tuple[float, ...]

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.family} {self.method} {self.setting}"

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a results file, by name."""
    rows = [
        Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    return {row.name: row for row in rows}


def against_fewer_steps(
    row: Row, rows: Sequence[Row], cost: str = "macs"
) -> tuple[float, float] | None:
    """A row's Fréchet distance less that of fewer steps at the same cost: below 0 is better.

    The curve of the uncached rows is interpolated, its logarithm linearly in the cost, for each seed by
    itself: the seeds share noise and labels between methods.

    Args:
        row: To compare.
        rows: With the uncached ones of its family.
        cost: ``"macs"`` or ``"seconds"``.

    Returns:
        Mean and standard deviation over the seeds; None outside the curve.
    """
    curve = sorted(
        (_cost(other, cost), np.log(other.distance))
        for other in rows
        if other.family == row.family and other.method == "uncached"
    )
    costs, logs = [at for at, _ in curve], np.array([log for _, log in curve])
    at = _cost(row, cost)
    if not curve or not costs[0] <= at <= costs[-1]:
        return None
    fewer = [np.exp(np.interp(at, costs, logs[:, seed])) for seed in range(len(row.distance))]
    gaps = np.array(row.distance) - fewer
    return float(gaps.mean()), spread(gaps)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation over the seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _cost(row: Row, cost: str) -> float:
    return row.macs if cost == "macs" else float(np.median(row.seconds))


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | method | reused | MACs | time | Fréchet distance | at equal MACs | class | drift |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = np.percentile(row.seconds, [10, 50, 90])
        gap = None if row.method == "uncached" else against_fewer_steps(row, rows)
        cells = [
            row.family,
            f"{row.method} {row.setting}",
            str(row.removed) if row.removed else "",
            f"{row.macs:.1%}",
            f"{middle:.1%} ({low:.1%} to {high:.1%})",
            f"{np.mean(row.distance):.3f} ± {spread(row.distance):.3f}",
            "" if gap is None else f"{gap[0]:+.3f} ± {gap[1]:.3f}",
            f"{np.mean(row.accuracy):.2%}",
            f"{np.mean(row.drift):.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_table(rows: Sequence[Row], others: Mapping[str, Row], precision: str) -> str:
    """The rows beside those of float32 from the same noise, as Markdown.

    Args:
        rows: In ``precision``.
        others: Of float32, by name, of as many samples and seeds.
        precision: Of the rows.
    """
    lines = [
        f"| model | method | Fréchet distance, float32 | {precision} | difference | within ± | "
        f"class, float32 | {precision} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = others[row.name]
        gaps = np.subtract(row.distance, base.distance)
        cells = [
            row.family,
            f"{row.method} {row.setting}",
            *(f"{np.mean(each.distance):.3f} ± {spread(each.distance):.3f}" for each in (base, row)),
            f"{np.mean(gaps):+.3f} ± {spread(gaps):.3f}",
            "yes" if abs(np.mean(gaps)) <= spread(base.distance) else "no",
            *(f"{np.mean(each.accuracy):.2%}" for each in (base, row)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Okabe and Ito's palette, and a marker each, so that no method is told by colour alone
_STYLES = {
    "uncached": ("#000000", "o", "-"),
    "L2C": ("#0072B2", "s", ""),
    "random": ("#E69F00", "^", ""),
    "FORA": ("#CC79A7", "D", ""),
}
_NAMES = {
    "uncached": "uncached, fewer steps",
    "L2C": "Learning-to-Cache",
    "random": "random, as many reused",
}


def draw(rows: Sequence[Row], path: Path, titles: dict[str, str]) -> None:
    """Draw distance against MACs and against time, one line of panels a family, into a PNG."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row.family for row in rows))
    figure = Figure(figsize=(10, 0.6 + 3.7 * len(families)), dpi=120, layout="constrained")
    panels = figure.subplots(len(families), 2, squeeze=False, sharey="row")
    for line, family in zip(panels, families, strict=True):
        for panel, cost in zip(line, ("macs", "seconds"), strict=True):
            _draw_panel(panel, [row for row in rows if row.family == family], cost)
        line[0].set_ylabel("Fréchet distance")
        line[0].set_title(titles.get(family, family), loc="left", fontsize=11)
    panels[-1][0].set_xlabel("MACs of an image, relative to 10 uncached calls")
    panels[-1][1].set_xlabel("measured time of an image, relative to 10 uncached calls")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_panel(panel: Any, rows: Sequence[Row], cost: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.grid(True, which="both", color="#e4e4e4", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    top = 1.25 * max(np.mean(row.distance) for row in rows if row.method != "random")
    bottom = 0.9 * min(np.mean(row.distance) for row in rows)
    panel.set_ylim(bottom, top)
    for method, (colour, marker, line) in _STYLES.items():
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.macs)
        for row in mine:
            if np.mean(row.distance) > top:  # a mask that ruins the images; the others stay readable
                text = f"↑ {np.mean(row.distance):.0f} ± {spread(row.distance):.0f}"
                at = (_cost(row, cost), top * 0.93)
                panel.annotate(text, at, color=colour, fontsize=8, ha="center")
        mine = [row for row in mine if np.mean(row.distance) <= top]
        if not mine:
            continue
        panel.errorbar(
            [_cost(row, cost) for row in mine],
            [np.mean(row.distance) for row in mine],
            [spread(row.distance) for row in mine],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=6,
            capsize=3,
            linewidth=1.2,
            label=_NAMES.get(method, method),
        )
        if method in ("uncached", "FORA"):
            for row in mine:
                at = (_cost(row, cost), np.mean(row.distance))
                text = row.setting.partition(" ")[0]
                panel.annotate(
                    text, at, xytext=(6, 5), textcoords="offset points", color=colour, fontsize=8
                )
