"""The Python module of TensorRT or TensorRT-RTX, whichever way it was installed."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from l2c_export.errors import UnsupportedError

MODULES = {
    "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "trt": ("tensorrt", "tensorrt_bindings"),
}
"""Backend to the modules that may be it; they come with or without their meta package."""

_INSTALLS = {"rtx": "pip install tensorrt-rtx-cu13", "trt": "pip install tensorrt"}

_JETSON = Path("/etc/nv_tegra_release")
"""Where it is, TensorRT comes from JetPack, and what pip would install does not run."""


@functools.cache
def tensorrt_module(backend: str) -> Any:
    """Import the module of a backend.

    Raises:
        UnsupportedError: None is installed that can run or build engines.
    """
    reasons = []
    for name in MODULES[backend]:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(" ".join(str(error).split()))
            continue
        if hasattr(module, "Runtime"):  # a package of type stubs is an empty namespace
            return module
        reasons.append(f"{name} is a stub")
    raise UnsupportedError(
        f"backend {backend!r} cannot import {MODULES[backend][0]} ({reasons[0]}); "
        f"install it with: {_install(backend)}"
    )


def _install(backend: str) -> str:
    if backend == "trt" and _JETSON.exists():
        return (
            "sudo apt install python3-libnvinfer, which is JetPack's, for the system's Python or a "
            "virtual environment with --system-site-packages"
        )
    return _INSTALLS[backend]
