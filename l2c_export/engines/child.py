"""One build in a process of its own: ``python -m l2c_export.engines.child``.

A builder in a process of its own cannot take the caller's memory along when it runs out, its log is
all its own, and Ctrl-C ends it at once. The first line of stdin is the job as JSON, the network
follows; the result is a line of JSON on stdout. The child ends when stdin does: its caller is gone.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from l2c_export.engines.tensorrt_api import BuildOptions, build_plan
from l2c_export.errors import L2CError


def main() -> None:
    """Do the job that stdin describes."""
    job = json.loads(sys.stdin.buffer.readline())
    network = sys.stdin.buffer.read(job["network_bytes"])
    threading.Thread(target=_end_with_caller, daemon=True).start()
    sys.stdout.write(json.dumps(build(job, network)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # not by way of the thread that still reads stdin


def build(job: dict[str, Any], network: bytes) -> dict[str, Any]:
    """Build a plan and its log; return how long it took, or what is wrong."""
    start = time.monotonic()
    options = BuildOptions(**job["options"])
    with lzma.open(job["log"], "wt", preset=1, encoding="utf-8") as log:
        try:
            plan = build_plan(
                job["backend"], network, job["path"], options, lambda line: _write(log, line)
            )
        except L2CError as error:
            return {"error": str(error), "exit_code": error.exit_code}
    Path(job["plan"]).write_bytes(plan)
    return {"seconds": time.monotonic() - start}


def _write(log: Any, line: str) -> None:
    log.write(line + "\n")


def _end_with_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
