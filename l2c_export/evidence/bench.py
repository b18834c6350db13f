"""How fast a bundle is beside its ceiling, beside no caching and beside eager PyTorch.

Everything that is compared is interleaved: each repeat runs the cached trajectory, the uncached one
and the peer one after the other, and ratios are taken within a repeat. So a machine that is slower
for a while is slower for both sides of a ratio.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l2c_export.core.bundle import WEIGHTS, Manifest, read_bundle
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence.child import Child
from l2c_export.evidence.machine import load_average, machine_json, proportional_set_size, usable_cores
from l2c_export.evidence.program_costs import ProgramCosts, cache_bytes, program_costs

if TYPE_CHECKING:
    from l2c_export.runtime.session import AnySession

PEERS = ("torch",)

PAUSE = 0.05
"""Seconds before each run, for the threads of the one before to stop spinning."""

Progress = Callable[[str, int, int], None]
"""Called with what is measured, how many repeats are done and how many there are."""


def bench(
    path: Path,
    *,
    batch: int = 1,
    repeats: int = 5,
    threads: int | None = None,
    backend: str = "ort",
    engines: str | None = None,
    peer: str | None = None,
    memory: bool = True,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        path: The bundle.
        batch: Latents in one call.
        repeats: Runs of each kind that are counted, after a warm-up.
        threads: For the backend and for the peer; None is one for each core.
        backend: Name of the backend.
        engines: Name of a folder of the bundle's engines; None for the best that fits.
        peer: ``"torch"`` also runs eager PyTorch with the same schedule.
        memory: Also measure the memory of a process of its own.
        progress: Told how far things are.

    Returns:
        The report, ready for JSON; times in seconds unless a key says otherwise.

    Raises:
        UnsupportedError: The peer is not installed.
        L2CError: The bundle is broken or does not take this batch.
    """
    manifest = read_bundle(path).manifest
    if peer not in (None, *PEERS):
        raise L2CError(f"unknown peer {peer!r}; known: {', '.join(PEERS)}")
    if peer and find_spec(peer) is None:
        raise UnsupportedError(f"--peer {peer} needs {peer}; pip install 'l2c-export[build]'")
    threads = threads or usable_cores()
    load_before = load_average()
    # First, while nobody else maps the weights: shared pages would count only in part.
    held = (
        measure_memory(path, manifest, backend, batch, threads, engines)
        if memory
        else {"skipped": "not asked for"}
    )
    version, runs = _measure(path, backend, engines, batch, repeats, threads, peer, progress)
    costs = program_costs(manifest)
    speed = _speed(costs, runs)
    return {
        "bundle": path.resolve().name,
        "model": manifest.model,
        "random_weights": manifest.random_weights,
        "batch": batch,
        "guidance": manifest.guidance is not None,
        "repeats": repeats,
        "threads": threads,
        "load_average_before": load_before,
        "speed": speed,
        "peer": _peer(runs) if peer else None,
        "calls": _calls(manifest, costs, runs),
        "graphs": _graphs(manifest, costs, runs),
        "all_reuse": _all_reuse(manifest, runs),
        "memory": held,
        "machine": machine_json(version, threads),
    }


@dataclass
class _Runs:
    """Seconds of the counted runs: whole trajectories, and (repeats, calls) for single calls."""

    cached: list[float]
    uncached: list[float]
    cached_calls: list[list[float]]
    uncached_calls: list[list[float]]
    peer: list[float]
    peer_name: str = ""


def _measure(
    path: Path,
    backend: str,
    engines: str | None,
    batch: int,
    repeats: int,
    threads: int,
    peer: str | None,
    progress: Progress,
) -> tuple[str, _Runs]:
    """The backend's version and the times, interleaved."""
    from l2c_export.runtime import Runner

    runner = Runner.load(path, backend, threads, engines=engines)
    session = runner.session(batch)
    labels = [i % runner.manifest.classes for i in range(batch)]
    runs = _Runs([], [], [], [], [])
    with contextlib.ExitStack() as stack:
        other = None
        if peer:
            other = stack.enter_context(Child(peer, _arguments(path, batch, threads)))
            runs.peer_name = other.answer()["ready"]
        progress("warm-up", 0, repeats)
        _trajectory(session, labels, True)
        whole = hasattr(session, "result")  # on a device, whose graphs are captured in the warm-up
        _trajectory(session, labels, False, calls=None if whole else 2)
        for i in range(repeats):
            progress("repeat", i, repeats)
            total, calls = _trajectory(session, labels, True)
            runs.cached.append(total)
            runs.cached_calls.append(calls)
            total, calls = _trajectory(session, labels, False)
            runs.uncached.append(total)
            runs.uncached_calls.append(calls)
            if other:
                time.sleep(PAUSE)
                runs.peer.append(other.ask()["seconds"])
    return runner.backend.version, runs


def _arguments(path: Path, batch: int, threads: int) -> dict[str, Any]:
    return {"bundle": str(path), "batch": batch, "threads": threads}


def _trajectory(
    session: AnySession, labels: Sequence[int], cached: bool, calls: int | None = None
) -> tuple[float, list[float]]:
    """Seconds of a trajectory and of each of its calls; the first call has the conditioning in it.

    A session on a device runs the trajectory as a whole, then once more call by call: to look at a
    single call is to wait for it.
    """
    time.sleep(PAUSE)
    whole = None
    if calls is None and hasattr(session, "result"):
        begin = time.perf_counter()
        session.start(labels, cached=cached, seed=0)
        session.run()
        _ = session.x  # waits
        whole = time.perf_counter() - begin
    marks = [time.perf_counter()]
    session.start(labels, cached=cached, seed=0)
    for result in session:
        marks.append(time.perf_counter())
        if result.index + 1 == calls:
            break
    return whole or marks[-1] - marks[0], np.diff(marks).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90]).tolist()
    return {"median": middle, "p10": low, "p90": high}


def _speed(costs: ProgramCosts, runs: _Runs) -> dict[str, Any]:
    measured = spread(np.divide(runs.uncached, runs.cached).tolist())
    return {
        "ideal": costs.ideal,
        "measured": measured,
        "of_ideal": measured["median"] / costs.ideal,
        "cached_seconds": spread(runs.cached),
        "uncached_seconds": spread(runs.uncached),
    }


def _peer(runs: _Runs) -> dict[str, Any]:
    """The peer's time over ours, both with the same schedule."""
    ratio = spread(np.divide(runs.peer, runs.cached).tolist())
    return {"name": runs.peer_name, "seconds": spread(runs.peer), "ratio": ratio}


def _calls(manifest: Manifest, costs: ProgramCosts, runs: _Runs) -> list[dict[str, Any]]:
    """Each call: milliseconds, and its share of a full call by MACs and by the clock.

    The clock's share is taken within a repeat, from the uncached call of the same timestep.
    """
    cached, uncached = np.array(runs.cached_calls), np.array(runs.uncached_calls)
    return [
        {
            "call": i,
            "timestep": call.timestep,
            "graph": call.graph,
            "computed": len(manifest.slots.names) - len(call.reads),
            "ms": spread((1e3 * cached[:, i]).tolist()),
            "ideal_share": costs.calls[i] / costs.full,
            "measured_share": spread((cached[:, i] / uncached[:, i]).tolist()),
        }
        for i, call in enumerate(manifest.calls)
    ]


def _graphs(manifest: Manifest, costs: ProgramCosts, runs: _Runs) -> list[dict[str, Any]]:
    """The same for the calls of each graph together."""
    cached, uncached = np.array(runs.cached_calls), np.array(runs.uncached_calls)
    entries = []
    for name in manifest.step_graphs():
        calls = [i for i, call in enumerate(manifest.calls) if call.graph == name]
        timed = _without_conditioning(calls)
        shares = (cached[:, timed] / uncached[:, timed]).ravel()
        entries.append(
            {
                "graph": name,
                "calls": calls,
                "computed": len(manifest.slots.names) - len(manifest.calls[calls[0]].reads),
                "ms": spread((1e3 * cached[:, timed]).ravel().tolist()),
                "ideal_share": costs.calls[calls[0]] / costs.full,
                "measured_share": spread(shares.tolist()),
            }
        )
    return entries


def _without_conditioning(calls: list[int]) -> list[int]:
    """The calls without the first of the trajectory, which computes the conditioning of many calls."""
    return [i for i in calls if i] or calls


def _all_reuse(manifest: Manifest, runs: _Runs) -> dict[str, Any] | None:
    """Share of a full call's time that a call takes which computes no slot at all."""
    everything = len(manifest.slots.names)
    calls = [i for i, call in enumerate(manifest.calls) if len(call.reads) == everything]
    if not calls:
        return None
    cached, uncached = np.array(runs.cached_calls), np.array(runs.uncached_calls)
    return {
        "calls": calls,
        "ms": spread((1e3 * cached[:, calls]).ravel().tolist()),
        "share": spread((cached[:, calls] / uncached[:, calls]).ravel().tolist()),
    }


def measure_memory(
    path: Path,
    manifest: Manifest,
    backend: str = "ort",
    batch: int = 1,
    threads: int = 1,
    engines: str | None = None,
) -> dict[str, Any]:
    """What a process that does nothing but run the bundle holds after a whole trajectory.

    On a device that is what the runner has allocated there, for each purpose: not the code of engines,
    nor what ONNX Runtime takes for itself.
    """
    weights, caches = manifest.files[WEIGHTS].bytes, cache_bytes(manifest, batch)
    sizes = {
        "weight_bytes": weights,
        "cache_bytes": caches,
        "floor_bytes": weights + caches,
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
    }
    how = {"backend": backend, "engines": engines}
    with Child("memory", _arguments(path, batch, threads) | how) as child:
        held = sizes | child.answer()
    if held["device_bytes"] is not None:
        return held
    if proportional_set_size() is None:
        return held | {"skipped": "PSS needs /proc/self/smaps_rollup, which only Linux has"}
    return held | {"of_weights": (held["pss_bytes"] - caches) / weights}
