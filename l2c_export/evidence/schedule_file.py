"""A schedule that is decided when a bundle runs: a file of it, and the runner that follows it."""

from __future__ import annotations

from pathlib import Path

from l2c_export.core.files import read_array
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
    reuse = read_array(schedule, "the schedule", "bools")
    per = None if backend == "ort" else "sublayer"
    return Runner.load(bundle, backend, threads, engines=engines, per=per).with_schedule(reuse)
