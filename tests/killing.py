"""Kill a build at each of its file-system operations, and see what is left.

In a test process the death is played: from one operation on, nothing reaches the disk any more. Run as
a program, it is real: a child is forked for each kill and gets SIGKILL, or dies in the middle of a
write. The export is replaced by a finished one, and what is cut from it is kept: what a kill can spoil
is on disk.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import tiny
import torch

from l2c_export.build import build as build_module
from l2c_export.build.build import Request, build_bundle
from l2c_export.core.bundle import MANIFEST, read_bundle
from l2c_export.core.files import replacing, sha256

Kill = Callable[[int, Path, Request], None]
"""Build in a folder, and die just before the operation of this number."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link"}


class Killed(BaseException):
    """What a played death raises, at the first operation and at all that follow."""


class _Watch:
    """Calls ``act`` before everything that this process does to the files in ``folder``."""

    folder: str | None = None
    act: Callable[[], None]

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None or (event != "open" and event not in _CHANGES):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(self.folder):
            self.act()


@functools.cache
def _watch() -> _Watch:
    watch = _Watch()
    sys.addaudithook(watch)  # it stays until the process ends
    return watch


def watched(folder: Path, work: Callable[[], object], act: Callable[[], None]) -> None:
    """Do some work, and call ``act`` before everything that it does to the files in a folder."""
    watch = _watch()
    watch.act, watch.folder = act, str(folder)
    try:
        work()
    finally:
        watch.folder = None


def _watched_build(folder: Path, request: Request, act: Callable[[], None]) -> None:
    watched(folder, lambda: build_bundle(folder, request), act)


def count_operations(folder: Path, request: Request) -> int:
    done: list[None] = []
    _watched_build(folder, request, lambda: done.append(None))
    return len(done)


# Two ways to die -------------------------------------------------------------------------------


def play_death(number: int, folder: Path, request: Request) -> None:
    left = iter(range(number))

    def act() -> None:
        if next(left, None) is None:
            raise Killed

    try:
        _watched_build(folder, request, act)
    except Killed:
        return
    raise AssertionError(f"the build was done before its operation {number}")


def kill_child(number: int, folder: Path, request: Request) -> None:
    left = iter(range(number))

    def act() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    _in_child(lambda: _watched_build(folder, request, act), signal.SIGKILL)


def kill_child_in_write(size: int, folder: Path, request: Request) -> None:
    """The kernel ends the process when it writes beyond ``size`` bytes of any file."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        build_bundle(folder, request)

    _in_child(work, signal.SIGXFSZ)


def _in_child(work: Callable[[], None], expected: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), f"the build was not killed, it ended with {status}"
    assert os.WTERMSIG(status) == expected


# Everything that can be left -------------------------------------------------------------------


def _state(folder: Path) -> str:
    """What lies in a folder; temporary files by their content alone."""
    files = tiny.contents(folder) if folder.exists() else {}
    named = [("partial" if ".l2c-partial-" in name else name, data) for name, data in files.items()]
    return repr((folder.exists(), sorted(named)))


def scenario(
    work: Path, before: Request | None, after: Request, kill: Kill, kill_in_write: Kill | None = None
) -> dict[str, int]:
    """Kill the build from ``before`` to ``after`` everywhere, and finish it from every state left.

    Raises:
        AssertionError: A folder with a manifest is not a whole bundle, or the finished one is not
            byte for byte what an undisturbed build makes.
    """
    start, folder, expected = work / "start", work / "bundle", work / "expected"
    build_bundle(expected, after)
    if before is not None:
        build_bundle(start, before)
    wanted = tiny.contents(expected)

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if before is not None:
            shutil.copytree(start, folder)

    def kills() -> Iterator[tuple[str, Callable[[], None]]]:
        for number in range(operations):
            yield f"operation {number}", functools.partial(kill, number, folder, after)
        for size in sizes:
            yield f"byte {size}", functools.partial(kill_in_write, size, folder, after)

    reset()
    operations = count_operations(folder, after)
    assert tiny.contents(folder) == wanted, "undisturbed"
    sizes: list[int] = []
    if kill_in_write is not None:
        sizes = sorted({size for data in wanted.values() for size in (len(data) // 2, len(data) - 1)})
    seen: set[str] = set()
    whole = 0
    for what, killed in kills():
        reset()
        killed()
        if (now := _state(folder)) in seen:
            continue
        seen.add(now)
        if (folder / MANIFEST).exists():
            read_bundle(folder).check_files()
            whole += 1
        build_bundle(folder, after)
        found = tiny.contents(folder)
        names = found.keys() | wanted.keys()
        wrong = sorted(name for name in names if found.get(name) != wanted.get(name))
        assert not wrong, f"{what}: {wrong}"
    return {
        "operations": operations,
        "writes": len(sizes),
        "states": len(seen),
        "whole": whole,
    }


# Without the slow parts ------------------------------------------------------------------------


def substitute(full: Path, patch: Callable[[object, str, object], None]) -> None:
    """Let builds take the exported graph from a file, and make every other file once only."""
    build = build_module._Build
    cutter, draw, interface = build._cutter, build._draw, build._interface
    made: dict[object, bytes] = {}

    def once(key: object, make: Callable[[Path], None], path: Path) -> None:
        if key not in made:
            make(path)
            made[key] = path.read_bytes()
        else:
            with replacing(path) as temporary:
                temporary.write_bytes(made[key])

    interfaces: dict[tuple[str, str], object] = {}

    def cached_interface(self, file):
        key = file, sha256(self.output / file)
        if key not in interfaces:
            interfaces[key] = interface(self, file)
        return interfaces[key]

    def cached_cutter(self, step):
        return lambda path: once((self._full_key, step), cutter(self, step), path)

    def cached_draw(self, path):
        once(repr(self.plan), lambda p: draw(self, p), path)

    patch(build, "_full", property(lambda self: ir.load(full)))
    patch(build, "_cutter", cached_cutter)
    patch(build, "_draw", cached_draw)
    patch(build, "_interface", cached_interface)


def main() -> None:
    """Arguments: the folder of the tiny files, a finished bundle, a folder to work in."""
    files, finished, work = map(Path, sys.argv[1:])
    torch.set_num_threads(1)  # a fork keeps one thread
    substitute(finished / "full.onnx", setattr)
    plan, changed = tiny.plan(files), tiny.plan(files, threshold=0.5)
    kills = kill_child, kill_child_in_write
    results = {
        "fresh": scenario(work / "fresh", None, tiny.request(plan), *kills),
        "changed": scenario(
            work / "changed", tiny.request(plan), tiny.request(changed, seed=4), *kills
        ),
    }
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
