"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError

_TEMPORARY = ".l2c-partial-"


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place if the block succeeds.

    A killed process leaves the old file or the whole new one.

    Args:
        path: The file.
        durable: Hold that for a power cut too: the content is on the disk before it has the name, and
            the name before this returns. It takes milliseconds, and seconds for gigabytes; files whose
            digest is in a durable one can do without, since their loss is found out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        if durable:
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(name, path)
        if durable:
            _flush_names(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems may have nothing to flush
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left of :func:`replacing`; the caller holds the folder's lock."""
    for stale in folder.glob(f"**/{_TEMPORARY}*"):
        stale.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON that is the same bytes for the same data."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """Hexadecimal SHA-256 of JSON-serialisable parts: the content key of a cached result."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_array(path: Path, what: str, of: str) -> NDArray[Any]:
    """The array of a ``.npy`` file, in which nothing is executed.

    Args:
        path: The file.
        what: What it is to be, for the message, such as ``"noise"``.
        of: What it is to hold, for the message, such as ``"numbers"``.

    Raises:
        L2CError: It cannot be read or is no such file.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise L2CError(f"cannot read {what} {path}: {error.strerror}") from None
    except (ValueError, EOFError, MemoryError) as error:
        raise L2CError(f"{what} {path} is not a .npy file of {of}: {error}") from None
