"""A benchmark for a terminal: the ceiling beside the measurement, the spread, the machine."""

from __future__ import annotations

import json
from typing import Any

from l2c_export.core.plan_report import runs_of, size

_LONG = ("calls", "graphs", "model")


def bench_table(data: dict[str, Any]) -> str:
    """The report of :func:`l2c_export.evidence.bench.bench`; its last line is JSON."""
    machine = data["machine"]
    rows = "with guidance" if data["guidance"] else "without guidance"
    threads = f"{data['threads']} thread{'s' * (data['threads'] > 1)}"
    weights = ", random weights" if data["random_weights"] else ""
    lines = [
        f"{data['bundle']}: batch {data['batch']} {rows}{weights}; median (p10 … p90) of "
        f"{data['repeats']} interleaved repeats",
        f"{machine['cpu']}, {threads}, {machine['backend']}, {machine['system']}",
        *busy(data),
        "",
        *_call_lines(data),
        "",
        *_graph_lines(data),
        *_speed_lines(data),
        *_memory_lines(data["memory"]),
        json.dumps({key: data[key] for key in data if key not in _LONG}, ensure_ascii=False),
    ]
    return "\n".join(lines)


def busy(data: dict[str, Any]) -> list[str]:
    """A line of warning, if the machine had other work to do before the measurement."""
    load = data["load_average_before"]
    if load is None or load < 0.5 * data["machine"]["cores"]:
        return []
    return [f"the machine was busy with other things: load average {load:.1f} before the start"]


def _call_lines(data: dict[str, Any]) -> list[str]:
    return [
        f"call      t  {'graph':13}  {'computed':>8}  {'ms':>26}  {'by MACs':>8}  {'measured':>8}",
        *(f"{c['call']:4}  {c['timestep']:5.4g}  {_row(c)}" for c in data["calls"]),
        "the time of call 0 has the conditioning in it",
    ]


def _graph_lines(data: dict[str, Any]) -> list[str]:
    """The graphs of several calls; the others are in the lines of their calls."""
    lines = [f"{_row(g)}  {runs_of(g['calls'], 24)}" for g in data["graphs"] if len(g["calls"]) > 1]
    if not lines:
        return []
    head = f"{'graph':13}  {'computed':>8}  {'ms a call':>26}  {'by MACs':>8}  {'measured':>8}  calls"
    return [head, *lines, ""]


def _row(entry: dict[str, Any]) -> str:
    return (
        f"{entry['graph']:13}  {entry['computed']:8}  {_spread(entry['ms'], '.1f'):>26}  "
        f"{100 * entry['ideal_share']:6.2f} %  {100 * entry['measured_share']['median']:6.2f} %"
    )


def _speed_lines(data: dict[str, Any]) -> list[str]:
    s, p, all_reuse = data["speed"], data["peer"], data["all_reuse"]
    lines = [
        f"trajectory  cached {_spread(s['cached_seconds'], '.3f')} s, "
        f"uncached {_spread(s['uncached_seconds'], '.3f')} s",
        f"speed-up    ideal {s['ideal']:.3f}x   measured {_spread(s['measured'], '.3f')}x   "
        f"{100 * s['of_ideal']:.1f} % of the ideal",
    ]
    if all_reuse:
        share = 100 * all_reuse["share"]["median"]
        lines.append(
            f"all reused  {_spread(all_reuse['ms'], '.2f')} ms a call, {share:.2f} % of a full one"
        )
    if p:
        lines.append(
            f"peer        {_spread(p['seconds'], '.3f')} s for {p['name']}, same schedule;\n"
            f"            the bundle runs at {_spread(p['ratio'], '.2f')}x its speed"
        )
    return lines


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    if "weight_bytes" not in memory:
        return []
    lines = [
        f"bundle      {size(memory['bundle_bytes'])}, of which weights {size(memory['weight_bytes'])}; "
        f"loaded in {memory['load_seconds']:.2f} s, digests checked"
    ]
    if parts := memory["device_bytes"]:
        each = ", ".join(f"{purpose} {size(count)}" for purpose, count in parts.items())
        return [*lines, f"memory      {size(sum(parts.values()))} on the device: {each}"]
    if "skipped" in memory:
        return [*lines, f"memory      not measured: {memory['skipped']}"]
    return [
        *lines,
        f"memory      PSS {size(memory['pss_bytes'])} after a trajectory; weights and caches alone "
        f"{size(memory['floor_bytes'])};",
        f"            without the {size(memory['cache_bytes'])} of caches {memory['of_weights']:.3f}x "
        f"the weights; {size(memory['imports_pss_bytes'])} of it before loading",
    ]


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['p10']:{form}} … {values['p90']:{form}})"
