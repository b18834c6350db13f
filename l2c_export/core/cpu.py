"""This machine's processor, as far as it decides how a kernel wants its weights laid out."""

from __future__ import annotations

import platform
from pathlib import Path

_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512vl",
    "avx512_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)
"""Those by which ONNX Runtime chooses its kernels for int8 products (its ``mlas/lib/platform.cpp``), as
Linux names them; the last two are Arm's."""


def cpu_target(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The architecture and those of its features that choose kernels: ``"x86_64+avx2+avx512vl"``.

    Where the system has no ``/proc/cpuinfo`` it is the architecture alone.
    """
    return "+".join((platform.machine() or "unknown", *_features(cpuinfo)))


def _features(cpuinfo: Path) -> list[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    has = set(found.partition(":")[2].split())
    return [name for name in _FEATURES if name in has]
