"""Processes of their own for what must not share one with the measured runner.

The memory of a deployment is measured in a process that imports nothing but the runtime. Eager
PyTorch runs in a process too: two thread pools in one process would spin on each other's cores.
A child speaks JSON, a line at a time: ``python -m l2c_export.evidence.child ROLE ARGUMENTS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import l2c_export
from l2c_export.core.bundle import read_bundle
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence.machine import anonymous_memory, proportional_set_size

if TYPE_CHECKING:
    from l2c_export.runtime import Runner
    from l2c_export.runtime.device.backend import DeviceBackend
    from l2c_export.runtime.device.session import DeviceSession
    from l2c_export.runtime.session import AnySession


class Child:
    """A running child; a context manager that ends it."""

    def __init__(self, role: str, arguments: dict[str, Any]) -> None:
        root = str(Path(l2c_export.__file__).parents[1])
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([root, inherited] if inherited else [root])
        # A file, because nobody would drain a pipe while the child works; __exit__ closes it.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "l2c_export.evidence.child", role, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )
        self._role = role

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def answer(self) -> dict[str, Any]:
        """Wait for the child's next line.

        Raises:
            L2CError: The child failed; with the last line that it left on stderr.
            UnsupportedError: It said that this machine cannot do it.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._errors.seek(0)
            last = next(reversed(self._errors.read().strip().splitlines()), "it said nothing")
            unsupported = self._process.returncode == UnsupportedError.exit_code
            kind = UnsupportedError if unsupported else L2CError
            raise kind(f"the {self._role} process failed: {last}")
        result: dict[str, Any] = json.loads(line)
        return result

    def ask(self) -> dict[str, Any]:
        """Let the child do its work once more, and wait for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that is gone has no answer: said below
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer()


def _say(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def _memory(bundle: str, backend: str, engines: str | None, batch: int, threads: int) -> None:
    """Load, run one cached trajectory, and say how long that took and what it holds."""
    from l2c_export.runtime import Runner

    before = proportional_set_size()
    start = time.perf_counter()
    runner = Runner.load(bundle, backend, threads, engines=engines)
    loaded = time.perf_counter() - start
    labels = [i % runner.manifest.classes for i in range(batch)]
    session = runner.session(batch)
    session.start(labels, seed=0)
    session.run()
    _ = session.x  # waits for a device
    _say(
        {
            "load_seconds": loaded,
            "device_bytes": _device_bytes(runner, session),
            "imports_pss_bytes": before,
            "pss_bytes": proportional_set_size(),
            "anonymous_bytes": anonymous_memory(),
        }
    )


def _device_bytes(runner: Runner, session: AnySession) -> dict[str, int] | None:
    """Purpose to bytes that the runner and a session hold on a device; None where there is none."""
    if not hasattr(session, "bytes"):
        return None
    weights = cast("DeviceBackend", runner.backend).weights
    return {"weights": weights.size, **cast("DeviceSession", session).bytes}


def _torch(bundle: str, batch: int, threads: int) -> None:
    """Sample with the eager reference, a trajectory for each line of input."""
    opened = read_bundle(Path(bundle))
    manifest = opened.manifest
    import numpy as np
    import torch

    from l2c_export.evidence.reference import bundle_reference

    torch.set_num_threads(threads)
    reference = bundle_reference(opened)
    noise = np.random.default_rng(0).standard_normal((batch, *manifest.latent), np.float32)
    x, labels = torch.from_numpy(noise), torch.arange(batch) % manifest.classes
    scale = manifest.guidance.scale if manifest.guidance else 1.0
    torch.manual_seed(0)

    def run(calls: int) -> None:
        program = manifest.calls[:calls]
        reused = [tuple(c.reads) for c in program]
        draws = (torch.randn_like(x) for _ in program) if manifest.stochastic else ()
        for _ in reference.trajectory(program, reused, labels, x, scale, draws):
            pass

    run(2)  # the warm-up: the weights are mapped and the threads there
    count = torch.get_num_threads()
    _say({"ready": f"PyTorch {torch.__version__} eager, {count} thread{'s' * (count > 1)}"})
    for _ in sys.stdin:
        start = time.perf_counter()
        run(len(manifest.calls))
        _say({"seconds": time.perf_counter() - start})


def _main() -> None:
    roles: dict[str, Callable[..., None]] = {"memory": _memory, "torch": _torch}
    try:
        roles[sys.argv[1]](**json.loads(sys.argv[2]))
    except L2CError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main()
