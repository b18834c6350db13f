"""The GPUs of this machine, as far as CUDA's own library tells."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from l2c_export.errors import UnsupportedError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As its maker calls it.
        capability: Compute capability, such as (8, 9).
        total: Bytes of memory.
        free: Bytes of memory that nobody uses now.
        driver: The newest CUDA version that the driver serves, such as ``"13.0"``.
    """

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    driver: str

    @property
    def target(self) -> str:
        """Its target, such as ``"sm89"``."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def find_gpus() -> tuple[Gpu, ...]:
    """All GPUs.

    Raises:
        UnsupportedError: There is none that CUDA can use; says why.
    """
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise UnsupportedError(
            f"cannot ask for GPUs: {error}; install it with: pip install cuda-bindings"
        ) from None
    (count,) = _call(runtime, "cudaGetDeviceCount")
    (driver,) = _call(runtime, "cudaDriverGetVersion")
    (before,) = _call(runtime, "cudaGetDevice")
    found = []
    try:
        for index in range(count):
            _call(runtime, "cudaSetDevice", index)
            (facts,) = _call(runtime, "cudaGetDeviceProperties", index)
            free, total = _call(runtime, "cudaMemGetInfo")
            name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
            version = f"{driver // 1000}.{driver % 1000 // 10}"
            found.append(Gpu(name.strip("\0"), (facts.major, facts.minor), total, free, version))
    finally:
        runtime.cudaSetDevice(before)
    return tuple(found)


def _call(runtime: Any, function: str, *arguments: Any) -> tuple[Any, ...]:
    try:
        error, *results = getattr(runtime, function)(*arguments)
    except RuntimeError as missing:  # the library itself is not there
        raise UnsupportedError(f"there is no CUDA here: {' '.join(str(missing).split())}") from None
    if error == runtime.cudaError_t.cudaSuccess:
        return tuple(results)
    text = runtime.cudaGetErrorString(error)[1].decode()
    hint = "; install the NVIDIA driver" if "Driver" in error.name or "NoDevice" in error.name else ""
    raise UnsupportedError(f"there is no GPU that CUDA can use: {text} ({error.name}){hint}")
