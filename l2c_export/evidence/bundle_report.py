"""A bundle as JSON and as text: what it holds and what its program does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from l2c_export.core.bundle import CONDITIONING, Bundle, Manifest, ProgramCall
from l2c_export.core.plan_report import sampler_name, size
from l2c_export.evidence.program_costs import cache_bytes

_DIGITS = 12  # of a digest, where people look
_CALLS_SHOWN = 8  # of a graph, in its line


def bundle_json(bundle: Bundle, checked: bool) -> dict[str, Any]:
    """The manifest, and what follows from it.

    Args:
        bundle: The bundle.
        checked: Whether its files have been compared with their digests.
    """
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "checked": checked,
        **asdict(manifest),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "cache_bytes": cache_bytes(manifest, manifest.batch[1]),
        "graph_calls": graph_calls(manifest),
    }


def graph_calls(manifest: Manifest) -> dict[str, list[int]]:
    """The step graphs that the program uses, with the calls that run them."""
    uses: dict[str, list[int]] = {}
    for i, call in enumerate(manifest.calls):
        uses.setdefault(call.graph, []).append(i)
    return uses


def bundle_table(bundle: Bundle, checked: bool) -> str:
    """The bundle for a terminal of 100 columns."""
    return "\n".join(
        [
            *_head(bundle, checked),
            "",
            *_graph_lines(bundle.manifest),
            "",
            *_call_lines(bundle.manifest),
        ]
    )


def _head(bundle: Bundle, checked: bool) -> list[str]:
    manifest = bundle.manifest
    low, high = manifest.batch
    guidance = manifest.guidance
    total = sum(file.bytes for file in manifest.files.values())
    latent = " x ".join(map(str, manifest.latent))
    removed = sum(len(call.reads) for call in manifest.calls)
    everything = len(manifest.slots.names) * len(manifest.calls)
    facts = {
        "bundle": f"{bundle.path}, {size(total)} in {len(manifest.files)} files, "
        f"by {manifest.generator}",
        "digests": "every file is what was built" if checked else "not checked",
        "model": f"{manifest.preset or manifest.model.get('family', 'unnamed')}, "
        f"{len(manifest.slots.names)} slots, {latent} latents, {manifest.classes} classes",
        "weights": _weights(manifest.weights),
        "schedule": f"{_schedule(manifest.schedule)}; {removed} of {everything} sub-layers reused",
        "sampler": f"{sampler_name(manifest.sampler, manifest.calls)}; {len(manifest.calls)} calls",
        "batch": f"{low}" if low == high else f"{low} to {high}",
        "guidance": f"scale {guidance.scale:g} on {guidance.channels} of {manifest.latent[0]} channels"
        if guidance
        else "none",
        "caches": f"{manifest.buffers} buffers, {size(cache_bytes(manifest, high))} at batch {high}",
    }
    return [f"{name:9} {text}" for name, text in facts.items()]


def _weights(source: dict[str, Any]) -> str:
    if source.get("kind") == "random":
        return f"RANDOM (seed {source.get('seed')}): for benchmarks, not for pictures"
    return f"{source.get('file', source.get('kind', 'unknown'))}{_sha256(source)}"


def _schedule(source: dict[str, Any]) -> str:
    if source.get("kind") != "router":
        return str(source.get("policy", source.get("kind", "unknown")))
    router = source.get("router", {})
    return f"{router.get('file', 'router')}{_sha256(router)} at θ = {source.get('threshold')}"


def _sha256(source: dict[str, Any]) -> str:
    return f" (sha256 {source['sha256'][:_DIGITS]}…)" if isinstance(source.get("sha256"), str) else ""


def _graph_lines(manifest: Manifest) -> list[str]:
    uses = graph_calls(manifest)
    width = max(len(name) for name in manifest.graphs)
    lines = [f"{'graph':{width}}  {'size':>10}  {'inputs':>6}  {'outputs':>7}  used by"]
    for name, graph in manifest.graphs.items():
        stored = size(manifest.files[graph.file].bytes)
        lines.append(
            f"{name:{width}}  {stored:>10}  {len(graph.inputs):6}  {len(graph.outputs):7}  "
            f"{_used_by(manifest, name, uses.get(name, []))}"
        )
    return lines


def _used_by(manifest: Manifest, name: str, calls: list[int]) -> str:
    if calls:
        shown = ", ".join(map(str, calls[:_CALLS_SHOWN]))
        more = f" … {calls[-1]} ({len(calls)})" if len(calls) > _CALLS_SHOWN else ""
        return f"call{'s' if len(calls) > 1 else ''} {shown}{more}"
    if name == CONDITIONING:
        return "all calls, at once"
    return {manifest.full: "verify", manifest.uncached: "uncached runs"}.get(name, "nothing")


def _call_lines(manifest: Manifest) -> list[str]:
    width = max(len(name) for name in manifest.step_graphs())
    lines = [
        f"{'call':>4}  {'t':>6}  {'graph':{width}}  {'computes':>8}  {'reads':>5}  {'writes':>6}  "
        "next latent"
    ]
    return lines + [_call_line(manifest, i, call, width) for i, call in enumerate(manifest.calls)]


def _call_line(manifest: Manifest, index: int, call: ProgramCall, width: int) -> str:
    computes = len(manifest.slots.names) - len(call.reads)
    update = " ".join(f"{number:+.4f} {source}" for source, number in call.update["x"].items())
    return (
        f"{index:4}  {call.timestep:6.4g}  {call.graph:{width}}  {computes:8}  {len(call.reads):5}  "
        f"{len(call.writes):6}  {update}"
    )
