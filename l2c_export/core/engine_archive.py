"""All plans of a set of engines in one file, compressed: they have almost all kernels in common."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from l2c_export.core.bundle import File
from l2c_export.core.engines import Engine, EngineSet
from l2c_export.core.files import replacing, sha256
from l2c_export.errors import L2CError

# Preset 1 finds what plans have in common (27 MB of three DiT-XL/2 plans become 0.2 MB) at hundreds of
# MB a second; the dictionary is larger than a plan, so that the next one can refer to all of it.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 64 << 20}]


def pack_plans(path: Path, plans: Iterable[bytes]) -> File:
    """Write the archive: all plans, one after the other; one xz stream if the name ends in ``.xz``."""
    with replacing(path) as temporary:
        with _open_archive(temporary, "wb") as file:
            for plan in plans:
                file.write(plan)
        return File(temporary.stat().st_size, sha256(temporary))


def check_archive(folder: Path, engines: EngineSet) -> None:
    """Compare the archive with its digest, without unpacking it.

    Raises:
        L2CError: It is missing, or is not what was built.
    """
    name, entry = engines.archive
    path, again = folder / name, "copy the bundle or build the engines again"
    try:
        if path.stat().st_size == entry.bytes and sha256(path) == entry.sha256:
            return
    except OSError as error:
        raise L2CError(f"cannot read {path}: {error.strerror}; {again}") from None
    raise L2CError(f"{path} does not match its digest; {again}")


def unpack_plans(folder: Path, engines: EngineSet) -> Iterator[tuple[Engine, bytes]]:
    """Each engine and its plan, checked against their digests.

    Raises:
        L2CError: The archive is missing, or is not what was built.
    """
    path = folder / engines.archive[0]
    again = "copy the bundle or build the engines again"
    try:
        with _open_archive(path, "rb") as file:
            for engine in engines.engines:
                plan = file.read(engine.bytes)
                if hashlib.sha256(plan).hexdigest() != engine.sha256:
                    raise L2CError(f"{path}: the engine of {engine.graph} is damaged; {again}")
                yield engine, plan
    except (OSError, EOFError, lzma.LZMAError) as error:
        said = getattr(error, "strerror", None) or error
        raise L2CError(f"cannot read {path}: {said}; {again}") from None


def _open_archive(path: Path, mode: str) -> IO[bytes]:
    if path.suffix != ".xz":
        return cast(IO[bytes], path.open(mode))
    writing: dict[str, Any] = {"format": lzma.FORMAT_XZ, "filters": _FILTERS} if mode == "wb" else {}
    return cast(IO[bytes], lzma.open(path, mode, **writing))
