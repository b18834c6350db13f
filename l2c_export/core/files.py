"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = ".l2c-partial-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


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
