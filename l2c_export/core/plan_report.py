"""A plan as JSON and as text: what each call computes, what is shared, and what it all costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2c_export.core.plan import Plan, StepGraph, live_writes
from l2c_export.core.precision import stored_tensors
from l2c_export.core.sampler_call import Step, is_stochastic

_WIDEST_STRIP = 60  # columns of the table that may show one character for each slot


def plan_json(plan: Plan, batch: int = 1) -> dict[str, Any]:
    """Everything that the plan says, for ``--json`` and for the bundle's ``reports/plan.json``.

    MACs are multiply-accumulates and include the guidance rows; MACs and cache bytes are for
    ``batch`` latents. Shares are of a call that computes everything, without the conditioning.
    """
    costs = plan.costs
    return {
        "model": plan.config.to_json(),
        "precision": plan.precision.name,
        "guidance": plan.guidance,
        "batch": batch,
        "sampler": plan.sampler,
        "schedule": schedule_json(plan),
        "calls": [
            {
                "call": i,
                "timestep": planned.call.timestep,
                "graph": planned.graph.name,
                "computed": len(plan.config.slots) - len(planned.reads),
                "reads": list(planned.reads),
                "writes": list(planned.writes),
                "macs": macs * batch,
                "share": macs / costs.full_macs,
            }
            for i, (planned, macs) in enumerate(zip(plan.calls, costs.call_macs, strict=True))
        ],
        "graphs": [
            {
                "name": graph.name,
                "calls": calls,
                "computed": len(plan.config.slots) - len(graph.reads),
                "reads": list(graph.reads),
                "writes": list(graph.writes),
                "share": costs.call_macs[calls[0]] / costs.full_macs,
            }
            for graph, calls in graph_calls(plan).items()
        ],
        "totals": {
            "macs": costs.total_macs * batch,
            "uncached_macs": costs.uncached_macs * batch,
            "ideal_speedup": costs.speedup,
            "full_call_macs": costs.full_macs * batch,
            "weight_bytes": costs.weight_bytes,
            "separate_weight_bytes": costs.copied_weight_bytes,
            "buffers": plan.buffers,
            "cache_bytes": costs.buffer_bytes * batch,
            "one_buffer_per_slot_bytes": costs.slot_bytes * len(plan.config.slots) * batch,
        },
        "conditioning": conditioning_json(plan),
        "merge": merge_json(plan),
    }


def graph_calls(plan: Plan) -> dict[StepGraph, list[int]]:
    """Each distinct graph with the calls that run it, in the order of first use."""
    uses: dict[StepGraph, list[int]] = {}
    for i, planned in enumerate(plan.calls):
        uses.setdefault(planned.graph, []).append(i)
    return uses


def schedule_json(plan: Plan) -> dict[str, Any]:
    """What the schedule removes, also as the paper counts it: of the calls that may reuse."""
    schedule, slots = plan.schedule, len(plan.config.slots)
    routed = int(schedule.source.get("routed_calls", np.any(plan.asked.reuse, axis=1).sum()))
    return {
        "source": schedule.source,
        "calls": schedule.calls,
        "slots": slots,
        "removed": schedule.removed,
        "routed": routed * slots,
        "removed_of_routed": schedule.removed / (routed * slots) if routed else 0.0,
        "removed_of_all": schedule.removed / (schedule.calls * slots),
    }


def conditioning_json(plan: Plan) -> dict[str, Any]:
    """The part that does not depend on x: computed once for all calls, outside the step graphs."""
    config = plan.config
    stored = stored_tensors(config, plan.precision).values()
    owned = sum(t.nbytes for t in stored if config.parameter_owner(t.parameter) == "conditioning")
    return {
        "macs": plan.costs.conditioning_macs,
        "macs_share": plan.costs.conditioning_macs / plan.costs.uncached_macs,
        "weight_bytes": owned,
        "weight_share": owned / plan.costs.weight_bytes,
    }


def merge_json(plan: Plan) -> dict[str, Any]:
    """What merging graphs cost against the schedule as it was asked for."""
    asked, reuse = plan.asked.reuse, plan.schedule.reuse
    writes = live_writes(asked)
    distinct = {row.tobytes() for row in np.concatenate([asked, writes], axis=1)}
    slot_macs = plan.config.slot_macs()
    per_slot = np.array([slot_macs[name] for name in plan.config.slots], np.int64)
    rows = 2 if plan.guidance else 1
    extra = rows * int((asked & ~reuse).sum(axis=0) @ per_slot)
    costs = plan.costs
    return {
        "graphs_asked": len(distinct),
        "graphs": len(plan.graphs),
        "computed_more": int((asked & ~reuse).sum()),
        "written_more": sum(len(c.writes) for c in plan.calls) - int(writes.sum()),
        "macs_more": extra,
        "ideal_speedup_asked": costs.uncached_macs / (costs.total_macs - extra),
    }


def schedule_name(plan: Plan) -> str:
    """The schedule in a few words: its router and threshold, or its kind."""
    source = plan.schedule.source
    if source.get("kind") != "router":
        return str(source.get("policy", source.get("kind", "schedule")))
    name = source.get("router", {}).get("file", "router")
    return f"{name} at θ = {source['threshold']:g}"


def sampler_name(name: str, calls: Sequence[Step]) -> str:
    """A sampler with what it needs beside the latent, in a few words."""
    kept = len({target for call in calls for target in call.update} - {"x"})
    keeps = f", keeps {kept} latent{'s' * (kept > 1)} between calls" if kept else ""
    noise = ", draws noise in its calls" if is_stochastic(calls) else ""
    return f"{name or 'unnamed'}{keeps}{noise}"


def model_name(plan: Plan) -> str:
    """The model's family and geometry in a few words."""
    c = plan.config
    blocks = f"{c.blocks} block{'s' if c.blocks > 1 else ''}"
    return f"{c.family}, {blocks} x {c.hidden_size}, {c.tokens} tokens"


def plan_table(plan: Plan, batch: int = 1) -> str:
    """The plan for a terminal of 100 columns: one line a call, one a graph, and the totals."""
    data = plan_json(plan, batch)
    return "\n".join(
        [*_head(plan), "", *_call_lines(plan), "", *_graph_lines(data), "", *_totals(data)]
    )


def _head(plan: Plan) -> list[str]:
    guidance = "with guidance" if plan.guidance else "without guidance"
    return [
        f"model     {model_name(plan)}, {guidance}",
        f"schedule  {schedule_name(plan)}, {len(plan.calls)} calls",
        f"sampler   {sampler_name(plan.sampler, [planned.call for planned in plan.calls])}",
    ]


def slots_by_part(plan: Plan) -> dict[str, list[int]]:
    """Slot indices by part (``attn``, ``mlp``), blocks ascending."""
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(plan.config.slots):
        parts.setdefault(name.partition(".")[2], []).append(i)
    return parts


def slot_states(plan: Plan) -> np.ndarray[Any, np.dtype[np.int8]]:
    """(calls, slots) int8: 0 compute, 1 compute and store, 2 reuse, 3 computed because of a merge."""
    stored = np.array([[s in c.writes for s in plan.config.slots] for c in plan.calls])
    states = np.where(plan.schedule.reuse, 2, np.where(stored, 1, 0))
    return np.where(plan.asked.reuse & ~plan.schedule.reuse, 3, states).astype(np.int8)


def _call_lines(plan: Plan) -> list[str]:
    parts, states = slots_by_part(plan), slot_states(plan)
    strips = len(plan.config.slots) <= _WIDEST_STRIP
    head = f"{'call':>4} {'t':>5}  {'graph':8}  {'computed':>8}  {'of full':>7}"
    widths = {part: max(len(part), len(at)) for part, at in parts.items()}
    if strips:
        head += "  " + "  ".join(f"{part:{widths[part]}}" for part in parts)
    lines = [head.rstrip()]
    total = len(plan.config.slots)
    for i, (planned, macs) in enumerate(zip(plan.calls, plan.costs.call_macs, strict=True)):
        line = (
            f"{i:4} {planned.call.timestep:5.4g}  {planned.graph.key}  {total - len(planned.reads):8}"
        )
        line += f"  {100 * macs / plan.costs.full_macs:5.1f} %"
        if strips:
            marks = ["".join("cW.+"[states[i, k]] for k in at) for at in parts.values()]
            line += "  " + "  ".join(f"{m:{w}}" for m, w in zip(marks, widths.values(), strict=True))
        lines.append(line.rstrip())
    if strips:
        legend = "c compute   W compute and write   . reuse"
        lines.append(
            " " * 8 + legend + ("   + computed to share a graph" if (states == 3).any() else "")
        )
    return lines


def _graph_lines(data: dict[str, Any]) -> list[str]:
    lines = [f"{'graph':13}  {'computed':>8}  {'reads':>5}  {'writes':>6}  {'of full':>7}  calls"]
    lines += [
        f"{g['name']:13}  {g['computed']:8}  {len(g['reads']):5}  {len(g['writes']):6}  "
        f"{100 * g['share']:5.1f} %  {runs_of(g['calls'], 44)}"
        for g in data["graphs"]
    ]
    return lines


def runs_of(numbers: list[int], width: int) -> str:
    """Numbers in at most ``width`` columns, the middle left out where they do not fit."""
    text = " ".join(map(str, numbers))
    if len(text) <= width:
        return text
    tail = f" … {numbers[-1]} ({len(numbers)} calls)"
    return text[: width - len(tail)].rpartition(" ")[0] + tail


def _totals(data: dict[str, Any]) -> list[str]:
    s, t, c, m = (data[key] for key in ("schedule", "totals", "conditioning", "merge"))
    removed = (
        f"{s['removed']} of {s['calls'] * s['slots']} sub-layers ({100 * s['removed_of_all']:.2f} %)"
    )
    if s["routed"]:
        removed = f"{s['removed']}/{s['routed']} of the routed calls' sub-layers " + (
            f"({100 * s['removed_of_routed']:.2f} %), {100 * s['removed_of_all']:.2f} % of all"
        )
    latents = "latent" if data["batch"] == 1 else f"{data['batch']} latents"
    lines = [
        f"removed       {removed}",
        f"compute       {t['macs'] / 1e9:,.1f} GMACs for one trajectory of "
        f"{'one latent' if data['batch'] == 1 else latents}, {t['uncached_macs'] / 1e9:,.1f} uncached",
        f"ideal         {t['ideal_speedup']:.3f}x faster by MACs",
        f"weights       {size(t['weight_bytes'])} once, {data['precision']}; "
        f"{size(t['separate_weight_bytes'])} if each graph had its own",
        f"caches        {size(t['cache_bytes'])} in {t['buffers']} buffers; "
        f"{size(t['one_buffer_per_slot_bytes'])} with one for each slot",
        f"conditioning  {100 * c['weight_share']:.1f} % of the weights, {100 * c['macs_share']:.2f} % "
        "of the MACs, once for all calls",
    ]
    if m["graphs"] < m["graphs_asked"]:
        lines.append(
            f"merged        {m['graphs_asked']} graphs to {m['graphs']}; more sub-layers "
            f"computed: {m['computed_more']}, written: {m['written_more']}; "
            f"ideal was {m['ideal_speedup_asked']:.3f}x"
        )
    return lines


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
