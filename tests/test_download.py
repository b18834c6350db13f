import hashlib
import io
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from l2c_export.build import download
from l2c_export.build.download import (
    CHECKPOINTS,
    ROUTERS,
    HttpsOnly,
    RemoteFile,
    cache_dir,
    fetch,
    find_checkpoint,
    find_router,
    open_https,
)
from l2c_export.core.models import PRESETS
from l2c_export.errors import L2CError

CONTENT = bytes(range(256)) * 40
FILE = RemoteFile(
    name="router.pt",
    url="https://example.org/router.pt",
    size=(1, 20_000),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    option="--router",
)
CHECKPOINT = replace(FILE, name="model.pt", sha256=None, size=(10_000, 20_000))


class Server:
    """Stands for the network: gives one response and counts how often it is asked."""

    def __init__(self, content: bytes = CONTENT, url: str = FILE.url, **headers: str) -> None:
        self.content, self.url = content, url
        self.headers = {"Content-Length": str(len(content))} | headers
        self.asked = 0

    def __call__(self, url: str) -> "Response":
        self.asked += 1
        return Response(self)


class Response:
    def __init__(self, server: Server) -> None:
        self.server, self.headers = server, server.headers
        self.file = io.BytesIO(server.content)

    def geturl(self) -> str:
        return self.server.url

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, 1000))

    def close(self) -> None:
        self.file.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("L2C_EXPORT_CACHE", str(folder))
    monkeypatch.delenv("L2C_EXPORT_OFFLINE", raising=False)
    yield folder
    assert not list(folder.glob(".*.part"))


def refusal(file: RemoteFile, server: Callable[[str], Any]) -> str:
    with pytest.raises(L2CError) as caught:
        fetch(file, server)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_downloaded_once_and_then_found(cache: Path) -> None:
    server = Server()
    path = fetch(FILE, server)
    assert path == cache / "router.pt"
    assert path.read_bytes() == CONTENT
    assert fetch(FILE, server) == path
    assert server.asked == 1


def test_the_digest_of_a_file_without_a_published_one_is_recorded(cache: Path) -> None:
    fetch(CHECKPOINT, Server())
    assert (cache / "model.pt.sha256").read_text() == f"{FILE.sha256}  model.pt\n"


def test_a_length_need_not_be_announced() -> None:
    server = Server()
    del server.headers["Content-Length"]
    assert fetch(FILE, server).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("file", "server", "words"),
    [
        (FILE, Server(b"another file"), ["SHA-256", str(FILE.sha256), "--router FILE"]),
        (FILE, Server(bytes(30_000)), ["announces 30000", "20000"]),
        (FILE, Server(bytes(30_000), **{"Content-Length": "10"}), ["more than 20000"]),
        (FILE, Server(**{"Content-Length": "10241"}), ["broke off", "10240 of 10241"]),
        (CHECKPOINT, Server(b"<html>", **{"Content-Length": ""}), ["broke off", "6 of 10000"]),
        (CHECKPOINT, Server(b"<html>"), ["announces 6"]),
        (FILE, Server(url="http://example.org/router.pt"), ["http://example.org", "https"]),
        (FILE, Server(url="file:///etc/passwd"), ["file:///etc/passwd", "https"]),
    ],
    ids=range(8),
)
def test_a_wrong_download_is_refused_and_leaves_nothing(
    cache: Path, file: RemoteFile, server: Server, words: list[str]
) -> None:
    message = refusal(file, server)
    assert all(word in message for word in words), message
    assert not (cache / file.name).exists()


@pytest.mark.parametrize("target", ["http://example.org/x", "ftp://example.org/x", "file:///x"])
def test_redirects_that_leave_https_are_refused(target: str) -> None:
    request = urllib.request.Request(FILE.url)
    with pytest.raises(L2CError, match="only https"):
        HttpsOnly().redirect_request(request, io.BytesIO(), 302, "Found", {}, target)
    with pytest.raises(L2CError, match="only https"):
        open_https(target)


def test_redirects_within_https_are_followed() -> None:
    request = urllib.request.Request(FILE.url)
    target = "https://cdn.example.org/router.pt"
    followed = HttpsOnly().redirect_request(request, io.BytesIO(), 302, "Found", {}, target)
    assert followed is not None
    assert followed.full_url == target


class Broken(Response):
    def read(self, size: int) -> bytes:
        raise IncompleteRead(b"")


def raising(error: Exception) -> Callable[[str], Any]:
    def opener(url: str) -> Any:
        raise error

    return opener


@pytest.mark.parametrize(
    ("opener", "reason"),
    [
        (raising(urllib.error.URLError("Name or service not known")), "Name or service not known"),
        (raising(urllib.error.HTTPError(FILE.url, 404, "Not Found", {}, None)), "404 Not Found"),  # type: ignore[arg-type]
        (raising(TimeoutError("timed out")), "timed out"),
        (lambda url: Broken(Server()), "IncompleteRead"),
    ],
    ids=range(4),
)
def test_without_a_network_the_error_says_what_to_do_by_hand(
    cache: Path, opener: Callable[[str], Any], reason: str
) -> None:
    message = refusal(FILE, opener)
    for word in (reason, "router.pt", FILE.url, str(cache / "router.pt"), "--router FILE"):
        assert word in message
    assert not (cache / "router.pt").exists()


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_offline_nothing_is_asked(cache: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("L2C_EXPORT_OFFLINE", value)
    server = Server()
    message = refusal(FILE, server)
    for word in ("L2C_EXPORT_OFFLINE", FILE.url, str(cache / "router.pt"), "--router FILE"):
        assert word in message
    assert server.asked == 0
    assert not cache.exists()


def test_offline_a_cached_file_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2C_EXPORT_OFFLINE", "0")
    fetch(FILE, Server())
    monkeypatch.setenv("L2C_EXPORT_OFFLINE", "1")
    assert fetch(FILE, Server()) == cache / "router.pt"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (FILE, b"something else", ["SHA-256", str(FILE.sha256), "delete it"]),
        (CHECKPOINT, b"half a mod", ["10 bytes", "delete it"]),
    ],
    ids=range(2),
)
def test_a_wrong_file_in_the_cache_is_named_and_kept(
    cache: Path, file: RemoteFile, content: bytes, words: list[str]
) -> None:
    cache.mkdir()
    (cache / file.name).write_bytes(content)
    message = refusal(file, Server())
    assert all(word in message for word in [*words, str(cache / file.name)]), message
    assert (cache / file.name).read_bytes() == content


def test_what_a_killed_download_left_is_overwritten(cache: Path) -> None:
    cache.mkdir()
    (cache / ".router.pt.part").write_bytes(bytes(50_000))
    assert fetch(FILE, Server()).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("L2C_EXPORT_CACHE", str(tmp_path / "file" / "cache"))
    assert "L2C_EXPORT_CACHE" in refusal(FILE, Server())


def test_two_at_once_download_once() -> None:
    server = Server()

    def opener(url: str) -> Any:
        time.sleep(0.1)
        return server(url)

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(FILE, opener))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert server.asked == 1


def test_progress_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(FILE, Server())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch(CHECKPOINT, Server())
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.pt" in err


# Presets ----------------------------------------------------------------------------------------


def test_the_presets_files_are_where_their_authors_put_them() -> None:
    urls = [file.url for file in [*CHECKPOINTS.values(), *ROUTERS.values()]]
    assert all(url.startswith("https://") for url in urls)
    assert CHECKPOINTS["dit-xl-2-512"].url == (
        "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt"
    )
    assert set(CHECKPOINTS) <= set(PRESETS)
    for preset, file in CHECKPOINTS.items():
        weights = 4 * sum(_numel(shape) for shape in PRESETS[preset].parameters().values())
        assert file.size[0] < weights < file.size[1]


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def test_found_files_come_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RemoteFile] = []
    monkeypatch.setattr(download, "fetch", lambda file: asked.append(file) or Path(file.name))
    assert find_checkpoint("dit-xl-2") == Path("DiT-XL-2-256x256.pt")
    assert find_router("dit-xl-2", "ddim", 50) == Path("DDIM50_router.pt")
    assert [file.option for file in asked] == ["--checkpoint", "--router"]


def test_a_released_router_in_the_cache_is_recognised(cache: Path) -> None:
    released = Path(__file__).resolve().parents[2] / "shared" / "routers" / "DDIM20_router.pt"
    if not released.is_file():
        pytest.skip(f"the released routers are not part of the project; {released} is missing")
    cache.mkdir()
    (cache / released.name).write_bytes(released.read_bytes())
    assert find_router("dit-xl-2", "ddim", 20) == cache / released.name


def test_models_without_official_files_say_what_to_give_instead() -> None:
    with pytest.raises(L2CError, match=r"dit-s-2 .*--checkpoint FILE or --random-weights SEED"):
        find_checkpoint("dit-s-2")
    with pytest.raises(L2CError, match=r"dit-xl-2 with ddim in 30 steps .*--router FILE"):
        find_router("dit-xl-2", "ddim", 30)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/l2c-export"),
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/l2c-export"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/l2c-export"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "{home}/Library/Caches/l2c-export"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/l2c-export/Cache"),
        ("win32", {}, "{home}/AppData/Local/l2c-export/Cache"),
        ("linux", {"L2C_EXPORT_CACHE": "~/mine"}, "{home}/mine"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("L2C_EXPORT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    home = os.path.expanduser("~")
    assert cache_dir() == Path(expected.format(home=home))
