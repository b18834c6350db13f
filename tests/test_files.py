"""Files appear whole or not at all, and are known by their content."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from l2c_export.core.files import key_of, remove_partial, replacing, sha256, write_json


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # on the same disk, or the swap would be a copy
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, did = tmp_path / "a.txt", []
    fsync, rename = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        kept = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        did.append("flush the folder" if kept == tmp_path else f"flush {kept.read_text()}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: did.append("rename") or rename(*names))
    with replacing(path, durable=True) as temporary:
        temporary.write_text("whole")
    assert did == ["flush whole", "rename", "flush the folder"]
    assert path.read_text() == "whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with replacing(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "reports").mkdir()
    mine = [tmp_path / "notes.txt", tmp_path / "reports" / ".hidden", tmp_path / "l2c-partial-mine"]
    stale = [tmp_path / ".l2c-partial-x.onnx", tmp_path / "reports" / ".l2c-partial-y.json"]
    for path in (*mine, *stale):
        path.write_text("")
    remove_partial(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(mine)


def test_json_is_the_same_bytes_for_the_same_data(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name, {"θ": 0.1, "calls": [1, 2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text(encoding="utf-8").endswith("}\n")
    assert "θ" in (tmp_path / "a").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a").read_bytes()) == {"θ": 0.1, "calls": [1, 2]}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_digest_is_that_of_all_bytes(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_key_is_of_the_content_and_not_of_its_order_in_a_dictionary():
    assert key_of("a", {"x": 1, "y": [2]}) == key_of("a", {"y": [2], "x": 1})
    different = [
        key_of(*parts) for parts in ((), ("a",), ("a", "b"), ("ab",), (["a", "b"],), (1,), ("1",))
    ]
    assert len(set(different)) == len(different)
