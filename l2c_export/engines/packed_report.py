"""Packed weights as JSON and as text: before a build what they will cost, after it what they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from l2c_export.core.packed import PackedWeights
from l2c_export.core.plan_report import size

if TYPE_CHECKING:
    from l2c_export.engines.packed import PackedBuild


def packed_plan_json(build: PackedBuild) -> dict[str, Any]:
    """What packing will take, in bytes; packed weights have sums and padding too, about a percent."""
    return {
        "bundle": str(build.bundle.path),
        "backend": "ort",
        "version": build.version,
        "cpu": build.cpu,
        "graphs": list(build.graphs),
        "packed_bytes": build.products,
        "disk_bytes": 2 * build.products,
    }


def packed_plan_text(build: PackedBuild) -> str:
    """The same for a terminal."""
    weights = size(build.products)
    return "\n".join(
        [
            f"{build.bundle.path}: weights of {len(build.graphs)} graphs, to be packed by onnxruntime "
            f"{build.version} for {build.cpu}",
            f"  disk        about {size(2 * build.products)}: {weights} as they are, as much packed; "
            "twice that meanwhile",
            f"  memory      as before: {weights} packed in place of {weights} unpacked, once for all",
        ]
    )


def packed_json(packed: PackedWeights) -> dict[str, Any]:
    """Packed weights, and what they weigh."""
    return {**asdict(packed), "backend": "ort", "folder": packed.folder, "bytes": packed.bytes}


def packed_text(packed: PackedWeights) -> str:
    """The same for a terminal."""
    held = f"{size(packed.packed_bytes)} of packed weights for {len(packed.graphs)} graphs"
    return f"{packed.folder}: {held}, {size(packed.bytes)} on disk"
