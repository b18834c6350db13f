"""A verification as JSON, and as a table for a terminal."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from l2c_export.core.bundle import MANIFEST
from l2c_export.core.files import sha256
from l2c_export.evidence.compare import CallErrors
from l2c_export.evidence.machine import machine_json, package_version
from l2c_export.evidence.verify import Report
from l2c_export.runtime import Runner


def report_json(report: Report, runner: Runner) -> dict[str, Any]:
    """The report for ``reports/verify.json``; errors that are not finite are strings."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    def entry(call: CallErrors) -> dict[str, Any]:
        return {
            "call": call.index,
            "timestep": call.timestep,
            "graph": call.graph,
            "output": number(call.output),
            "slots": {name: number(error) for name, error in call.slots.items()},
            "latent": number(call.latent),
        }

    return {
        "passed": report.failure is None,
        "failure": report.failure,
        "tolerance": asdict(report.tolerance),
        "worst": number(report.worst),
        "inputs": report.inputs,
        "manifest_sha256": sha256(runner.bundle.path / MANIFEST),
        "calls": [entry(call) for call in report.cached],
        "uncached": [entry(call) for call in report.uncached],
        "cached_from_uncached": [number(delta) for delta in report.delta],
        "unrounded": number(report.unrounded.worst) if report.unrounded else None,
        "machine": machine_json(runner.backend.version) | {"torch": package_version("torch")},
    }


def report_table(report: Report) -> str:
    """The report for a terminal of 100 columns: one line a call, and the verdict."""
    lines = [
        f"{'':25}{' teacher forcing, by call ':-^31}   {' free running, latent ':-^34}",
        f"call     t  {'graph':13} {'output':>8} {'slots':>5} {'worst slot':>16}   "
        f"{'cached':>9} {'uncached':>9} {'caching moves':>14}",
    ]
    for i, call in enumerate(report.cached):
        name, error = call.worst_slot
        slot = f"{name} {error:.1e}" if name else "-"
        line = f"{call.index:4} {call.timestep:5.4g}  {call.graph:13} {call.output:8.1e} "
        line += f"{len(call.slots):5} {slot:>16}   {call.latent:9.1e}"
        if i < len(report.uncached):
            line += f" {report.uncached[i].latent:9.1e} {report.delta[i]:14.1e}"
        lines.append(line + ("  <- bad" if _bad(report, i) else ""))
    if report.unrounded:
        lines.append("the bundle's own graphs and schedule on the CPU, without rounding activations:")
        lines.append(f"        {_worst(report.unrounded)}")
    if report.failure:
        lines.append(f"FAILED  {report.failure}")
    else:
        lines.append(f"PASSED  {_worst(report)}")
    return "\n".join(lines)


def _worst(report: Report) -> str:
    allowed = report.tolerance
    return (
        f"worst error {report.worst:.1e}; allowed: slots {allowed.slots:.1e}, "
        f"outputs {allowed.output:.1e}, latents {allowed.latent:.1e}"
    )


def _bad(report: Report, i: int) -> bool:
    calls = [report.cached[i], *report.uncached[i : i + 1]]
    return any(call.fault(report.tolerance) for call in calls)
