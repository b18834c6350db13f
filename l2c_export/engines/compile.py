"""One network to one plan, in a process of its own that Ctrl-C ends at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from l2c_export.engines.tensorrt_api import BuildOptions
from l2c_export.errors import L2CError, UnsupportedError

Tick = Callable[[], None]
"""Called several times a second."""

# What builders say in their own words, and what a user can do about it.
_KNOWN = (
    (
        "for Turing (SM75)",
        "sm75 multiplies matrices in float16 alone: build the bundle with --precision float16, "
        "or leave sm75 out",
    ),
    (
        "HW-specific datatypes: b16",
        "sm75 has no bfloat16: build the bundle with --precision float16, or leave sm75 out",
    ),
    (
        "HW-specific datatypes: fp8",
        "float8 needs sm89 or later: build the bundle with --precision int8-weights",
    ),
    ("Target SM", "this release of TensorRT-RTX does not build for one of the targets"),
    (
        "CUDA initialization failure",
        "TensorRT builds on the GPU that runs the engines, and finds none or an old driver here "
        "(see: l2c-export doctor); on a machine without one, use --backend rtx",
    ),
    (
        "out of memory",
        "the GPU has too little free memory for this build: close what else uses it, or give "
        "--workspace and a smaller batch range",
    ),
)


def compile_network(
    backend: str,
    network: bytes,
    path: Path,
    options: BuildOptions,
    plan: Path,
    log: Path,
    tick: Tick = lambda: None,
) -> float:
    """Build one engine.

    Args:
        backend: ``"trt"`` or ``"rtx"``.
        network: A serialised ``ModelProto``.
        path: File beside which its external data lies, if it has any.
        options: What the builder is told.
        plan: Where the plan goes.
        log: Where the builder's log goes, xz-compressed.
        tick: Told that time goes by.

    Returns:
        Seconds that the builder took.

    Raises:
        L2CError: It cannot be built; what a user can do comes before the builder's own words.
        UnsupportedError: The backend is not installed, or the process ran out of memory.
    """
    job = {
        "backend": backend,
        "network_bytes": len(network),
        "path": str(path),
        "options": asdict(options),
        "plan": str(plan),
        "log": str(log),
    }
    command = [sys.executable, "-m", "l2c_export.engines.child"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C comes to us alone
        ) as child,
    ):
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n" + network)
            child.stdin.flush()  # and left open: the child ends when its caller does
            while child.poll() is None:
                tick()
                time.sleep(0.05)
        except BrokenPipeError:
            pass  # it died young, and has said why
        finally:
            child.kill()
        out, _ = child.communicate()
        errors.seek(0)
        return _result(child.returncode, out, errors.read())


def _result(code: int, out: bytes, errors: bytes) -> float:
    if code == -signal.SIGKILL:
        raise UnsupportedError(
            "the builder was killed by the system, most likely for want of memory: close other "
            "programs, or build a smaller batch range"
        )
    try:
        said = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise L2CError(f"the builder ended with code {code}: {last[-1]}") from None
    if "error" in said:
        kind = UnsupportedError if said["exit_code"] == UnsupportedError.exit_code else L2CError
        raise kind(explain(said["error"]))
    return float(said["seconds"])


def explain(error: str) -> str:
    """What a user can do about a builder's error, if that is known, and then the error."""
    known = way_out(error)
    return f"{known}; the builder says: {error}" if known else error


def way_out(error: str) -> str | None:
    """What a user can do about a builder's error, explained or not, if that is known."""
    return next((known for sign, known in _KNOWN if sign.lower() in error.lower()), None)
