"""A tuning as a picture: drift against time and against multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2c_export.build.plan_picture import write_figure
from l2c_export.evidence.tune_choice import Row

# Okabe and Ito's colours, which people with any colour vision tell apart; the markers differ too.
_STYLES = tuple(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
        ("o", "s", "^", "D", "v", "P", "X"),
        strict=True,
    )
)
_INK, _GREY, _PAPER = "#22303c", "#6b7885", "#ffffff"
_FONT = 7.5  # points, of a label

Share = Callable[[Row], float]


def draw_tune(data: dict[str, Any], path: Path) -> None:
    """Write a PNG of the report of :func:`l2c_export.evidence.tune.tune`.

    Raises:
        L2CError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=150, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(
        1,
        2,
        sharex=True,
        sharey=True,
        gridspec_kw={"left": 0.075, "right": 0.985, "top": 0.8, "bottom": 0.115, "wspace": 0.06},
    )
    kind = "measured" if data["repeats"] else "predicted"
    _draw(axes[0], data, _time, f"{kind} time")
    _draw(axes[1], data, _macs, "multiply-accumulates")
    axes[0].set_ylabel("drift: relative L2 from uncached", fontsize=9, color=_INK)
    axes[0].set_ylim(bottom=0)
    _draw_budget(axes, data)
    _label(axes[0], data["rows"], _time)
    _label(axes[1], data["rows"], _macs)
    _title(figure, data)
    write_figure(figure, path)


def _time(row: Row) -> float:
    return float(row["time"]["share"])


def _macs(row: Row) -> float:
    return float(row["macs_share"])


def _draw(axis: Any, data: dict[str, Any], x_of: Share, name: str) -> None:
    """One panel: a line a router, a point a threshold."""
    timed = name.endswith("time")
    for number, _ in enumerate(data["routers"]):
        colour, marker = _STYLES[number % len(_STYLES)]
        rows = [r for r in data["rows"] if r["router"] == number]
        x, y = [100 * x_of(r) for r in rows], [r["drift"]["mean"] for r in rows]
        axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.45, zorder=2)
        axis.errorbar(
            x,
            y,
            xerr=_x_errors(rows) if timed and data["repeats"] else None,
            yerr=[r["drift"]["standard_error"] for r in rows],
            fmt="none",
            ecolor=colour,
            elinewidth=0.7,
            alpha=0.5,
            zorder=2,
        )
        for row, a, b in zip(rows, x, y, strict=True):
            face = colour if row["front"] else _PAPER
            axis.plot(a, b, marker, color=colour, markerfacecolor=face, markersize=5.5, zorder=3)
            if row["chosen"]:
                axis.plot(a, b, "o", color=_INK, markerfacecolor="none", markersize=13, zorder=4)
    axis.margins(x=0.08)
    axis.grid(color="#e6eaee", linewidth=0.7, zorder=0)
    axis.tick_params(length=0, labelsize=8, colors=_GREY)
    axis.xaxis.set_major_formatter("{x:g} %")
    axis.set_xlabel(f"{name}, of the uncached trajectory's", fontsize=9, color=_INK)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _x_errors(rows: list[Row]) -> list[list[float]]:
    shares = [row["measured"]["share"] for row in rows]
    return [
        [100 * (s["median"] - s["p10"]) for s in shares],
        [100 * (s["p90"] - s["median"]) for s in shares],
    ]


def _draw_budget(axes: Any, data: dict[str, Any]) -> None:
    """A line that the chosen point must not cross."""
    budget, style = data["budget"], {"color": _GREY, "linewidth": 1, "linestyle": (0, (4, 3))}
    if budget is None:
        return
    if budget["kind"] == "drift":
        for axis in axes:
            axis.axhline(budget["limit"], **style)
        return
    limit = budget["limit"]
    if budget["kind"] == "ms":
        uncached = data["uncached"]
        limit /= uncached["ms"]["median"] if uncached["ms"] else uncached["predicted_ms"]
    axes[0].axvline(100 * limit, **style)


def _label(axis: Any, rows: list[Row], x_of: Share) -> None:
    """Thresholds beside their points, where there is room; the chosen and the front's first."""
    from matplotlib.patheffects import withStroke

    halo, pixels = [withStroke(linewidth=2, foreground=_PAPER)], axis.figure.dpi / 72
    height = 1.2 * _FONT * pixels
    spots = [axis.transData.transform((100 * x_of(row), row["drift"]["mean"])) for row in rows]
    taken = [(x - 4 * pixels, y - 4 * pixels, x + 4 * pixels, y + 4 * pixels) for x, y in spots]
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["chosen"], not rows[i]["front"]))
    for i in order:
        text, (x, y) = str(rows[i]["threshold"]), spots[i]
        width = 0.6 * _FONT * pixels * len(text)
        gap = 7 * pixels
        corners = [
            (x - gap - width, y + 0.2 * gap),
            (x + gap, y - 0.2 * gap - height),
            (x + gap, y + 0.2 * gap),
            (x - gap - width, y - 0.2 * gap - height),
            (x - width / 2, y + gap),
            (x - width / 2, y - gap - height),
        ]
        boxes = [(left, low, left + width, low + height) for left, low in corners]
        free = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), None)
        if free is None:
            continue
        taken.append(free)
        at = axis.transData.inverted().transform(free[:2])
        axis.text(*at, text, fontsize=_FONT, color=_INK, va="bottom", zorder=5, path_effects=halo)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _title(figure: Any, data: dict[str, Any]) -> None:
    name = data["preset"] or data["model"]["family"]
    figure.text(0.075, 0.965, f"{name}: routers at thresholds θ", fontsize=12, weight="bold", va="top")
    machine = data["machine"]
    facts = (
        f"{data['calls']} calls of {data['sampler']}, batch {data['batch']}; drift: mean of "
        f"{data['samples']} latents ± standard error, seed {data['seed']}"
    )
    if data["repeats"]:
        facts += f"; time: median of {data['repeats']}, p10 to p90, {machine['cpu']}"
    figure.text(0.075, 0.905, facts, fontsize=8, color=_GREY, va="top")
    handles = []
    for number, router in enumerate(data["routers"]):
        colour, marker = _STYLES[number % len(_STYLES)]
        penalty = "" if router["penalty"] is None else f", λ = {router['penalty']:g}"
        handles.append(_handle(f"{router['name']}{penalty}", marker, color=colour))
    points: dict[str, Any] = {"color": _GREY, "linestyle": "none"}
    handles.append(_handle("on the front", "o", **points))
    handles.append(_handle("not on it", "o", markerfacecolor=_PAPER, **points))
    if data["chosen"] is not None:
        handles.append(_handle("chosen", "o", 12, markerfacecolor=_PAPER, **points))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.07, 0.875),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        borderpad=0,
        columnspacing=1.6,
    )


def _handle(label: str, marker: str, size: float = 5.5, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, markersize=size, label=label, **style)
