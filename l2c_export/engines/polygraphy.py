"""What NVIDIA's Polygraphy is told to narrow down a network that does not build."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

INSTALL = "pip install 'l2c-export[debug]'"


def reduce_command(
    backend: str, network: Path, targets: Sequence[str] = (), external: Path | None = None
) -> str:
    """The shell command that reduces a network to the smallest part of it that does not build.

    Args:
        backend: ``"trt"`` or ``"rtx"``.
        network: The ``.onnx`` file.
        targets: ``"sm89"`` … that it was to be built for; empty for the builder's own choice.
        external: Folder of the weights that the file refers to, if it does.
    """
    reduced, tried = network.with_suffix(".reduced.onnx"), "polygraphy_debug.onnx"
    command = ["polygraphy", "debug", "reduce", str(network), "-o", str(reduced)]
    if external is not None:
        command += ["--external-data-dir", str(external)]
    command += ["--check", "polygraphy", "convert", tried, "--convert-to", "trt", "-o", "reduced.plan"]
    if backend == "trt":
        return shlex.join([*command, "--strongly-typed"])
    if targets:
        versions = (target.removeprefix("sm") for target in targets)
        command += ["--compute-capabilities", *(f"{v[:-1]}.{v[-1]}" for v in versions)]
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join(command)}"
