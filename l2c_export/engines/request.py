"""What a user asks of engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l2c_export.core.engines import CONSTANTS
from l2c_export.errors import L2CError, UnsupportedError

BACKENDS = ("rtx", "trt", "ort")
"""TensorRT-RTX ahead of time, TensorRT on the GPU it is for, or bare networks for ONNX Runtime."""


@dataclass(frozen=True)
class EngineRequest:
    """What to build engines with.

    Attributes:
        backend: One of :data:`BACKENDS`.
        targets: ``"sm89"`` …; empty for portable engines (rtx), or those of this machine's GPU (trt).
        constant: Whether every engine holds its weights, instead of taking them as inputs.
        per: One of :data:`l2c_export.core.engines.PER`: what gets an engine.
        max_vram: Bytes of device memory that a session may need; None for any.
        optimization_level: As in :class:`l2c_export.engines.tensorrt_api.BuildOptions`.
        workspace: As there.
        tf32: As there.
    """

    backend: str
    targets: tuple[str, ...] = ()
    constant: bool = False
    per: str = "graph"
    max_vram: int | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    tf32: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the engines depend on, besides the targets."""
        return {
            "weights": CONSTANTS if self.constant else "inputs",
            "per": self.per,
            "optimization_level": self.optimization_level,
            "workspace": self.workspace,
            "tf32": self.tf32,
        }


def check_precision(name: str, precision: str, backend: str) -> None:
    """Refuse a bundle whose precision is for ONNX Runtime on a CPU alone.

    Args:
        name: The bundle.
        precision: Its precision.
        backend: One of :data:`BACKENDS`, or ``ort-cuda``, which runs the networks of ``ort`` on a GPU.

    Raises:
        UnsupportedError: It is.
    """
    if precision == "int8" and backend != "ort":
        raise UnsupportedError(
            f"{name} is int8 in the form of ONNX Runtime on a CPU, which {backend} "
            "does not take: build it with --precision float16"
        )


def parse_targets(text: str) -> tuple[str, ...]:
    """Targets from ``"sm86,sm89"``, in ascending order.

    Raises:
        L2CError: It is something else.
    """
    names = {name.strip().lower() for name in text.split(",")}
    if bad := sorted(name for name in names if not (name[:2] == "sm" and name[2:].isdigit())):
        raise L2CError(f"target {bad[0]!r} is not a compute capability such as sm89")
    return tuple(sorted(names, key=lambda name: int(name[2:])))
