"""A schedule that is decided when a bundle runs: a file of it, and the runner that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError
from l2c_export.runtime import Runner


def load_runner(
    bundle: Path,
    backend: str,
    threads: int | None,
    engines: str | None = None,
    schedule: Path | None = None,
) -> Runner:
    """Load a bundle, to run its own schedule or another.

    Args:
        bundle: Its folder.
        backend: What runs the graphs.
        threads: For each call; None for the backend's choice.
        engines: Name of a folder of the bundle's engines; None for the best that fits.
        schedule: A ``.npy`` file of (calls, slots) bool, True where a slot is reused, for engines
            that are for each kind of sub-layer; None for the bundle's own.

    Raises:
        UnsupportedError: The backend has no such engines.
        L2CError: The file cannot be read, or its schedule does not fit.
    """
    if schedule is None:
        return Runner.load(bundle, backend, threads, engines=engines)
    reuse = _read(schedule)
    per = None if backend == "ort" else "sublayer"
    return Runner.load(bundle, backend, threads, engines=engines, per=per).with_schedule(reuse)


def _read(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise L2CError(f"cannot read the schedule {path}: {error.strerror}") from None
    except (ValueError, EOFError, MemoryError) as error:
        raise L2CError(f"the schedule {path} is not a .npy file of bools: {error}") from None
