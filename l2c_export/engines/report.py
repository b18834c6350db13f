"""Engines as JSON and as text: before a build what they will cost, after it what they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle
from l2c_export.core.engines import PER, EngineSet, command_name
from l2c_export.core.plan_report import size

if TYPE_CHECKING:
    from l2c_export.engines.build import EngineBuild

_SERVES = {"graph": "", "sublayer": "; they serve every schedule, decided when it runs"}


def plan_json(build: EngineBuild) -> dict[str, Any]:
    """What a build would make, and its price in bytes of device memory."""
    request = build.request
    return {
        "bundle": str(build.bundle.path),
        "backend": request.backend,
        "version": build.version,
        "families": [list(targets) for targets in build.families],
        **request.options,
        **asdict(build.price),
        "engines": len(build.networks) * len(build.families),
        "total": build.price.total,
        "max_vram": request.max_vram,
        "other": build.other and {**asdict(build.other), "total": build.other.total},
    }


def plan_text(build: EngineBuild) -> str:
    """The same for a terminal."""
    price, request = build.price, build.request
    count = price.engines * len(build.families)
    targets = "; ".join(", ".join(family) for family in build.families)
    share = price.separate / max(1, price.weights + price.constants)
    held = (
        f"{size(price.constants)} in {price.engines} engines, each with its own"
        if request.constant
        else f"{size(price.weights)} once, {size(price.constants)} of small constants in engines"
    )
    if not build.stages and not request.constant:
        held += f"; {size(price.separate)} if each engine had its own ({share:.1f} x)"
    lines = [
        f"{build.bundle.path}: {count} engines for {command_name(request.backend)} {build.version}, "
        f"targets {targets}",
        f"  weights     {held}",
        f"  caches      {size(price.caches)}",
        f"  state       {size(price.state)} of latents and conditioning",
        f"  in all      {size(price.total)} of device memory, and scratch and code when built",
        f"  a call      runs {price.runs} engines at most{_SERVES[request.per]}",
    ]
    if (other := build.other) is not None:
        (per,) = {*PER} - {request.per}
        lines.append(
            f"  or          --per {per}: {other.engines * len(build.families)} engines, "
            f"{size(other.total)}, {other.runs} a call{_SERVES[per]}"
        )
    return "\n".join(lines)


def engines_json(bundle: Bundle, sets: Iterable[EngineSet]) -> list[dict[str, Any]]:
    """Sets of engines, and what they weigh."""
    weights = bundle.manifest.files[WEIGHTS].bytes
    return [
        {
            **asdict(made),
            "folder": made.folder,
            "plan_bytes": made.plan_bytes,
            "scratch": made.scratch,
            "stored_share": made.archive[1].bytes / weights,
        }
        for made in sets
    ]


def engines_text(bundle: Bundle, made: EngineSet) -> str:
    """A set of engines for a terminal; kernels a block where all blocks are computed."""
    blocks = len(bundle.manifest.slots.names) // 2
    stored, weights = made.archive[1].bytes, bundle.manifest.files[WEIGHTS].bytes
    lines = [
        f"{made.folder}: {len(made.engines)} engines, {size(made.plan_bytes)} of plans stored in "
        f"{size(stored)} ({stored / weights:.2%} of the weights), {scratch_text(made)}",
    ]
    if not any(engine.fusion for engine in made.engines):
        why = "networks, not compiled" if made.backend == "ort" else "not in the builder's log"
        return "\n".join([*lines, f"  (no list of kernels: {why})"])
    lines += _calls_text(bundle, made)
    lines.append(
        f"  {'engine':16}  {'plan':>9}  {'scratch':>9}  {'kernels':>7}  {'a block':>7}  "
        f"{'attention':>9}  loose: bias GELU"
    )
    for engine in made.engines:
        if not (fused := engine.fusion):
            continue
        scratch = size(engine.scratch) if engine.scratch else "-"
        attention = f"{fused['fused_attentions']} of {fused['attentions']}"
        block = f"{fused['kernels'] / blocks:.2f}" if fused["attentions"] == blocks else "-"
        lines.append(
            f"  {engine.graph:16}  {size(engine.bytes):>9}  {scratch:>9}  {fused['kernels']:>7}  "
            f"{block:>7}  {attention:>9}  {fused['loose_biases']:>11} {fused['loose_activations']:>4}"
        )
    return "\n".join(lines)


def scratch_text(made: EngineSet) -> str:
    """The scratch of a set of engines, in words."""
    if all(engine.scratch is None for engine in made.engines):
        return "scratch unknown until it runs"
    return f"{size(made.scratch)} of scratch"


def _calls_text(bundle: Bundle, made: EngineSet) -> list[str]:
    """Kernels of a whole trajectory and of its calls, where they are known for this very bundle."""
    kernels = {engine.graph: engine.fusion["kernels"] for engine in made.engines if engine.fusion}
    runs = [made.runs(call) for call in bundle.manifest.calls]
    if not kernels.keys() >= {CONDITIONING}.union(*runs):
        return []
    calls = [sum(kernels[graph] for graph in call) for call in runs]
    return [
        f"  {len(calls)} calls run {sum(calls)} kernels, {min(calls)} to {max(calls)} each, and the "
        f"conditioning {kernels[CONDITIONING]}"
    ]
