"""What a report was measured on, and how much memory a process uses."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from l2c_export import __version__


def machine_json(backend: str, threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, system and versions."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": threads or usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "backend": backend,
        "l2c_export": __version__,
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Of the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def package_version(name: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def proportional_set_size() -> int | None:
    """PSS of this process in bytes: private pages, and its share of shared ones. Linux only."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss:")


def anonymous_memory() -> int | None:
    """The part of the PSS that no file stands behind: buffers, heaps, stacks. Linux only."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss_Anon:")


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)
