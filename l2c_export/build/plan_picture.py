"""A plan as a picture: calls x sub-layers, and what each call costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from l2c_export.core.files import replacing
from l2c_export.core.plan import Plan
from l2c_export.core.plan_report import (
    model_name,
    schedule_json,
    schedule_name,
    slot_states,
    slots_by_part,
)
from l2c_export.errors import L2CError, UnsupportedError

_STATES = ("compute", "compute and store", "reuse", "computed to share a graph")
_COLOURS = ("#9db8cc", "#1f5a85", "#f6dfae", "#c2477f")
_INK, _GREY, _PAPER = "#22303c", "#6b7885", "#ffffff"
_BAR = 0.92
_PART_NAMES = {"attn": "attention", "mlp": "MLP"}


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a PNG: the same bytes for the same plan and the same matplotlib.

    Raises:
        L2CError: The file cannot be written.
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"a picture needs {error.name}; install it with: pip install 'l2c-export[report]'"
        ) from None
    parts = slots_by_part(plan)
    tallest = max(len(at) for at in parts.values())
    panel = min(max(0.115 * tallest, 0.9), 5.0)  # inches
    grid_height = panel * len(parts)
    height = 1.83 + 0.95 + grid_height + 0.25 * len(parts)
    width = min(max(7.2, 2.0 + 0.36 * len(plan.calls)), 13.0)
    figure = Figure(figsize=(width, height), dpi=150, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, right, top = 0.95, 0.3, 1.08  # inches
    axes: Any = figure.subplots(
        1 + len(parts),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={
            "height_ratios": [0.95, *[panel] * len(parts)],
            "left": left / width,
            "right": 1 - right / width,
            "top": 1 - top / height,
            "bottom": 0.75 / height,
            "hspace": 0.16 / ((0.95 + grid_height) / (1 + len(parts))),
        },
    )[:, 0]
    for axis in axes:
        axis.yaxis.set_label_coords(-0.52 / (width - left - right), 0.5)
    _draw_shares(axes[0], plan)
    states = slot_states(plan)
    for axis, (part, at) in zip(axes[1:], parts.items(), strict=True):
        _draw_part(axis, states[:, at], _PART_NAMES.get(part, part))
    _label_calls(axes[-1], plan, width - left - right)
    _title(figure, plan, left / width, height)
    _legend(figure, states, left / width, height)
    write_figure(figure, path)


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG, the same bytes for the same figure.

    Raises:
        L2CError: It cannot be written there.
    """
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    except OSError as error:
        raise L2CError(f"cannot write {path}: {error.strerror}") from None


def _bare(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0, labelsize=8, colors=_GREY)


def _draw_shares(axis: Any, plan: Plan) -> None:
    """Bars: each call's share of a call that computes everything."""
    shares = np.array(plan.costs.call_macs) / plan.costs.full_macs
    at = np.arange(len(shares)) + 0.5
    axis.bar(at, np.ones_like(shares), width=_BAR, color="#eef1f4")
    axis.bar(at, shares, width=_BAR, color=_INK)
    if len(shares) <= 26:
        for x, share in zip(at, shares, strict=True):
            text = f"{100 * share:.0f}" if share >= 0.0995 or share < 0.0005 else f"{100 * share:.1f}"
            axis.text(x, 1.05, text, ha="center", va="bottom", fontsize=7, color=_GREY)
    axis.set_ylim(0, 1.0)
    axis.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
    axis.set_ylabel("MACs\nof a full call", fontsize=8, color=_INK)
    _bare(axis)


def _draw_part(axis: Any, states: np.ndarray[Any, Any], name: str) -> None:
    """One kind of sub-layer: a cell for each call and block, the first block on top."""
    from matplotlib.colors import ListedColormap

    calls, blocks = states.shape
    axis.pcolormesh(
        np.arange(calls + 1),
        np.arange(blocks + 1),
        states.T,
        cmap=ListedColormap(_COLOURS),
        vmin=-0.5,
        vmax=3.5,
        edgecolors=_PAPER,
        linewidth=0.8 if calls <= 30 else 0.5,
    )
    axis.invert_yaxis()
    every = 1 if blocks <= 8 else 4 if blocks <= 32 else 8
    shown = [*range(0, blocks - every // 2, every), blocks - 1] if blocks > 1 else [0]
    axis.set_yticks([b + 0.5 for b in dict.fromkeys(shown)], list(dict.fromkeys(shown)))
    axis.set_ylabel(f"{name}\nof block", fontsize=8, color=_INK)
    _bare(axis)


def _label_calls(axis: Any, plan: Plan, inches: float) -> None:
    """Timesteps below the last panel, as many as fit."""
    calls = len(plan.calls)
    every = max(1, int(np.ceil(0.3 * calls / inches)))
    shown = list(range(0, calls - every, every)) if every > 1 else list(range(calls - 1))
    shown.append(calls - 1)
    axis.set_xticks([i + 0.5 for i in shown], [f"{plan.calls[i].call.timestep:g}" for i in shown])
    axis.set_xlim(0, calls)
    axis.set_xlabel("timestep of the call, in the order of execution: noise  →  image", fontsize=8)
    axis.xaxis.label.set_color(_INK)


def _title(figure: Any, plan: Plan, left: float, height: float) -> None:
    data = schedule_json(plan)
    removed = f"{data['removed']} of {data['calls'] * data['slots']} sub-layers reused"
    if data["routed"]:
        share = 100 * data["removed_of_routed"]
        removed = f"{data['removed']} of {data['routed']} routed sub-layers reused ({share:.1f} %)"
    graphs = f"{len(plan.graphs)} graph{'s' if len(plan.graphs) > 1 else ''}"
    name = schedule_name(plan)
    figure.text(left, 1 - 0.17 / height, name, fontsize=12, weight="bold", color=_INK, va="top")
    facts = f"{removed}    {graphs}    ideal {plan.costs.speedup:.2f}x faster"
    figure.text(left, 1 - 0.43 / height, facts, fontsize=8.5, color=_INK, va="top")
    figure.text(left, 1 - 0.62 / height, model_name(plan), fontsize=8, color=_GREY, va="top")


def _legend(figure: Any, states: np.ndarray[Any, Any], left: float, height: float) -> None:
    from matplotlib.patches import Patch

    present = [k for k in range(4) if (states == k).any()]
    figure.legend(
        handles=[Patch(color=_COLOURS[k], label=_STATES[k]) for k in present],
        loc="lower left",
        bbox_to_anchor=(left, 0.06 / height),
        borderaxespad=0,
        borderpad=0,
        ncols=4,
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.8,
    )
