"""Official files of the presets: found in a local cache, else downloaded over https and checked.

Nothing that is downloaded is executed: checkpoints and routers are read by ``safe_load``. Released
weights and routers come under their own licences.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import click

from l2c_export.core.files import sha256
from l2c_export.errors import L2CError

_TIMEOUT = 30.0  # seconds without a byte
_PIECE = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """An official file.

    Attributes:
        name: Its file name, here and in the cache.
        url: Where it is published.
        size: (least, most) bytes; more is never written.
        sha256: Its digest, or None where none is known; then the size is all that is checked.
        option: The command-line option that gives this file by hand.
    """

    name: str
    url: str
    size: tuple[int, int]
    sha256: str | None
    option: str


def _checkpoint(url: str, name: str, size: int) -> RemoteFile:
    """Weights of about this size; their owners publish no digests."""
    return RemoteFile(name, url, (round(0.98 * size), round(1.04 * size)), None, "--checkpoint")


def _router(folder: str, name: str, sha256: str) -> RemoteFile:
    return RemoteFile(name, f"{folder}/{name}", (1, 1 << 20), sha256, "--router")


_META = "https://dl.fbaipublicfiles.com/DiT/models"
_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="

CHECKPOINTS = {
    "dit-xl-2": _checkpoint(f"{_META}/DiT-XL-2-256x256.pt", "DiT-XL-2-256x256.pt", 2_700_000_000),
    "dit-xl-2-512": _checkpoint(f"{_META}/DiT-XL-2-512x512.pt", "DiT-XL-2-512x512.pt", 2_704_000_000),
    "uvit-h-2": _checkpoint(
        f"{_DRIVE}13StUdrjaaSXjfqqF7M47BzPyhMAArQ4u", "imagenet256_uvit_huge.pth", 2_003_000_000
    ),
    "uvit-h-4-512": _checkpoint(
        f"{_DRIVE}1uegr2o7cuKXtf2akWGAN2Vnlrtw5YKQq", "imagenet512_uvit_huge.pth", 2_004_000_000
    ),
}
"""Official float32 weights by preset: Meta's of DiT, and those that baofff/U-ViT's README links to."""

_L2C = "https://raw.githubusercontent.com/horseee/learning-to-cache"
_L2C_DIT = f"{_L2C}/23d80454a9ff42f8eec55a68db83ec88cf859c62/DiT/ckpt"
_L2C_UVIT = f"{_L2C}/be8c5d2c2f9d7baa82c9efef90a97c0ab5e208d4/U-ViT/ckpt"

ROUTERS = {
    ("dit-xl-2", "ddim", 20): _router(
        _L2C_DIT,
        "DDIM20_router.pt",
        "c3134cfe7a69e31f188ac3d8ace7f6b586db92daa30c99f17e46d3f24e7408c7",
    ),
    ("dit-xl-2", "ddim", 50): _router(
        _L2C_DIT,
        "DDIM50_router.pt",
        "fd83c172f77ad71f8695d5972497d1a4d113119e0e0415861812ca8eea9f60b2",
    ),
    ("uvit-h-2", "dpm-solver-2s", 20): _router(
        _L2C_UVIT,
        "dpm20_router.pth",
        "836ee44bd212985cc7e03e619691cd5530677dcbd0121b2558674fdca9bf59a1",
    ),
    ("uvit-h-2", "dpm-solver-2s", 50): _router(
        _L2C_UVIT,
        "dpm50_router.pth",
        "6778122d7b4ac1816d98d7c0de18727f42956bb6de0233a30215bfebf91c8578",
    ),
}
"""Routers that the authors of Learning-to-Cache released, by (preset, sampler, calls)."""


class Response(Protocol):
    """What is used of ``http.client.HTTPResponse``."""

    headers: Any

    def geturl(self) -> str:
        """The address after redirects."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""

    def close(self) -> None:
        """Drop the connection."""


Opener = Callable[[str], Response]


def find_checkpoint(preset: str) -> Path:
    """The official checkpoint of a preset, from the cache or downloaded into it.

    Raises:
        L2CError: There is none, or it cannot be had here; the message says what to do by hand.
    """
    if preset not in CHECKPOINTS:
        raise L2CError(
            f"{preset} has no checkpoint to download (only {', '.join(CHECKPOINTS)} have); "
            "give --checkpoint FILE or --random-weights SEED"
        )
    return fetch(CHECKPOINTS[preset])


def find_router(preset: str, sampler: str, steps: int) -> Path:
    """The released router of a preset, from the cache or downloaded into it.

    Raises:
        L2CError: There is none, or it cannot be had here; the message says what to do by hand.
    """
    if (preset, sampler, steps) not in ROUTERS:
        known = ", ".join(f"{p} with {s} in {n} steps" for p, s, n in ROUTERS)
        raise L2CError(
            f"no released router for {preset} with {sampler} in {steps} steps (there is: {known}); "
            "give --router FILE, or make one with l2c-export train-router"
        )
    return fetch(ROUTERS[preset, sampler, steps])


def released_for(digest: str) -> str | None:
    """The preset that a released router with this SHA-256 is for; None of any other file."""
    return next((preset for (preset, *_), file in ROUTERS.items() if file.sha256 == digest), None)


def cache_dir() -> Path:
    """$L2C_EXPORT_CACHE, or the platform's folder for caches."""
    if chosen := os.environ.get("L2C_EXPORT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData/Local") / "l2c-export" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "l2c-export"
    base = os.environ.get("XDG_CACHE_HOME")  # must be absolute, says its specification
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "l2c-export"


def fetch(file: RemoteFile, opener: Opener | None = None) -> Path:
    """A file from the cache, downloaded first if it is not there; it appears whole or not at all.

    Args:
        file: What to get.
        opener: Opens an address; for tests. By default https through urllib and its proxies.

    Raises:
        L2CError: Offline, refused, of the wrong size or content, or the cache cannot be written.
    """
    path = cache_dir() / file.name
    if path.exists():
        return _checked(path, file)
    if os.environ.get("L2C_EXPORT_OFFLINE", "").lower() not in ("", "0", "false", "no"):
        raise L2CError(_by_hand(file, path, "L2C_EXPORT_OFFLINE is set"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if not path.exists():  # another process may have been first
                _download(file, path, opener or open_https)
    except OSError as error:
        reason = error.strerror or str(error)
        raise L2CError(
            f"cannot write {path}: {reason}; set L2C_EXPORT_CACHE to another folder"
        ) from None
    return _checked(path, file)


def _checked(path: Path, file: RemoteFile) -> Path:
    """A cached file; small ones, whose digest is known, are read again every time."""
    size = path.stat().st_size
    if not file.size[0] <= size <= file.size[1]:
        raise L2CError(f"{path} has {size} bytes, which {file.name} never has; delete it and run again")
    if file.sha256 and (found := sha256(path)) != file.sha256:
        raise L2CError(
            f"{path} is not the released file: its SHA-256 is {found}, not {file.sha256}; "
            "delete it and run again"
        )
    return path


def _by_hand(file: RemoteFile, path: Path, reason: str) -> str:
    return (
        f"{file.name} is not on this machine and cannot be downloaded ({reason}): get {file.url} "
        f"elsewhere and put it at {path}, or give {file.option} FILE"
    )


def _lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    """One download of a file at a time; the lock goes with the process."""
    try:
        from filelock import FileLock
    except ModuleNotFoundError:
        raise L2CError(
            "downloading needs filelock; install it with: pip install 'l2c-export[build]'"
        ) from None
    return FileLock(path.with_name(f".{path.name}.lock"))


# The download -----------------------------------------------------------------------------------


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follow redirects to https alone; urllib would also go to http and ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Refuse every other scheme."""
        _check_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise L2CError(f"refused to download from {url[:200]}: only https is allowed")


def open_https(url: str) -> Response:
    """Open an https address, verifying certificates."""
    _check_https(url)
    request = urllib.request.Request(url, headers={"User-Agent": "l2c-export"})
    response: Response = urllib.request.build_opener(HttpsOnly).open(request, timeout=_TIMEOUT)
    return response


def _download(file: RemoteFile, path: Path, opener: Opener) -> None:
    """Write to a sibling that takes the file's place when it is whole and checked."""
    part = path.with_name(f".{path.name}.part")  # one name: a killed download leaves no second copy
    try:
        with _network(file, path):
            response = opener(file.url)
        try:
            digest = _receive(file, path, part, response)
        finally:
            response.close()
        if file.sha256 and digest != file.sha256:
            raise L2CError(
                f"{file.url} gave another file: its SHA-256 is {digest}, not {file.sha256}; "
                f"give {file.option} FILE"
            )
        # As sha256sum writes it: what this file was on the day it came.
        path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _receive(file: RemoteFile, path: Path, part: Path, response: Response) -> str:
    """Write a response to ``part``, never more than allowed; its SHA-256."""
    _check_https(response.geturl())
    least, most = file.size
    announced = response.headers.get("Content-Length")
    total = int(announced) if announced and announced.isdecimal() else None
    if total is not None and not least <= total <= most:
        raise L2CError(
            f"{file.url} announces {total} bytes, {file.name} has {least} to {most}; refused"
        )
    digest, size = hashlib.sha256(), 0
    with part.open("wb") as out, _progress(file.name, total) as advance:
        while True:
            with _network(file, path):
                piece = response.read(_PIECE)
            if not piece:
                break
            size += len(piece)
            if size > most:
                raise L2CError(f"{file.url} sends more than {most} bytes; refused")
            digest.update(piece)
            out.write(piece)
            advance(len(piece))
    if size < (total or least):
        raise L2CError(f"{file.url} broke off after {size} of {total or least} bytes; run again")
    return digest.hexdigest()


@contextlib.contextmanager
def _network(file: RemoteFile, path: Path) -> Iterator[None]:
    """Say what to do by hand when the network fails, apart from failures of the disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise L2CError(_by_hand(file, path, f"the server says {error.code} {error.reason}")) from None
    except urllib.error.URLError as error:
        raise L2CError(_by_hand(file, path, str(error.reason))) from None
    except (OSError, http.client.HTTPException) as error:
        raise L2CError(_by_hand(file, path, str(error) or type(error).__name__)) from None


@contextlib.contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not (total and sys.stderr.isatty()):
        yield lambda _: None
        return
    label = f"{name} ({total / 1e6:.0f} MB)"
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update
