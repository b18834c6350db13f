"""The record of a bundle's engines, and the archive of their plans."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from l2c_export.core.bundle import CONDITIONING, File, Value
from l2c_export.core.engine_archive import check_archive, pack_plans, unpack_plans
from l2c_export.core.engines import (
    ENGINES,
    PORTABLE,
    RECORD,
    UPDATE,
    Engine,
    EngineSet,
    find_engines,
    misfit,
    read_record,
    source_of,
    unread_engines,
    write_record,
)
from l2c_export.core.files import sha256
from l2c_export.errors import L2CError, UnsupportedError

PLANS = {"step-1": b"kernel" * 1000, UPDATE: b"other" * 10}


def write_engines(folder, **changes) -> EngineSet:
    """Two engines that nobody can run."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = pack_plans(folder / "plans.xz", PLANS.values())
    values = (Value("x", "float32", ("batch", 4, 8, 8)),)
    engines = []
    for graph, plan in PLANS.items():
        (folder / "plan").write_bytes(plan)
        digest = sha256(folder / "plan")
        engines.append(
            Engine(graph, "key", "source", len(plan), digest, values, (), values, ("pos_embed",), 7)
        )
    made = EngineSet(
        "rtx", "1.7", ("sm86", "sm89"), {}, {"batch": (1, 1, 2)}, ("plans.xz", archive), tuple(engines)
    )
    made = replace(made, **changes)
    write_record(folder, made)
    return made


def test_what_is_written_is_read(tmp_path):
    made = write_engines(tmp_path)
    assert read_record(tmp_path) == made
    assert {e.graph: plan for e, plan in unpack_plans(tmp_path, made)} == PLANS
    assert (made.plan_bytes, made.scratch) == (6050, 7)
    assert made.folder == "rtx-1.7-sm86+sm89"


def test_plans_that_have_much_in_common_are_stored_once(tmp_path):
    plan = random.Random(0).randbytes(100_000)
    packed = pack_plans(tmp_path / "plans.xz", [plan, plan[:50_000] + b"!" + plan[50_000:], plan])
    assert packed.bytes < 1.02 * len(plan)


def test_an_edited_record_is_refused(tmp_path):
    write_engines(tmp_path)
    path = tmp_path / RECORD
    path.write_text(path.read_text().replace("sm89", "sm90"))
    with pytest.raises(L2CError, match="does not match its own digest"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is not a record of engines"),
        ('{"format": "l2c-engines", "version": 2}', "is damaged"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(L2CError, match=message):
        read_record(tmp_path)


def test_a_later_record_is_refused(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"format": "l2c-engines", "version": 99}))
    with pytest.raises(UnsupportedError, match="version 99"):
        read_record(tmp_path)


def test_a_record_cannot_name_an_archive_outside_its_folder(tmp_path):
    write_engines(tmp_path, archive=("../plans.xz", File(1, "")))
    with pytest.raises(L2CError):
        read_record(tmp_path)


def test_a_damaged_archive_is_refused(tmp_path):
    made = write_engines(tmp_path)
    path = tmp_path / "plans.xz"
    pack_plans(path, [b"another" * 1000])
    with pytest.raises(L2CError, match="engine of step-1 is damaged"):
        list(unpack_plans(tmp_path, made))
    path.write_bytes(b"no archive")
    with pytest.raises(L2CError, match="cannot read"):
        list(unpack_plans(tmp_path, made))
    path.unlink()
    with pytest.raises(L2CError) as missing:
        list(unpack_plans(tmp_path, made))
    assert str(missing.value) == (
        f"cannot read {path}: No such file or directory; copy the bundle or build the engines again"
    )


@pytest.mark.parametrize(
    ("backend", "version", "capability", "reason"),
    [
        ("rtx", "1.7", (8, 9), None),
        ("rtx", "1.7", None, None),
        ("trt", "1.7", (8, 9), "built for the backend rtx, not trt"),
        ("rtx", "1.8", (8, 9), "built with rtx 1.7, this machine has 1.8"),
        ("rtx", "1.7", (12, 0), "built for sm86, sm89, this device is sm120"),
    ],
)
def test_a_misfit_is_explained(tmp_path, backend, version, capability, reason):
    assert misfit(write_engines(tmp_path), backend, version, capability) == reason


def test_portable_engines_run_from_ampere_on(tmp_path):
    made = write_engines(tmp_path, targets=(PORTABLE,))
    assert misfit(made, "rtx", "1.7", (12, 1)) is None
    assert "sm75" in str(misfit(made, "rtx", "1.7", (7, 5)))
    assert "sm90" in str(misfit(made, "rtx", "1.7", (9, 0)))


def test_engines_of_another_bundle_are_refused(tmp_path, tiny_bundle):
    manifest = tiny_bundle.manifest
    made = write_engines(tmp_path)
    with pytest.raises(L2CError, match="were built for another schedule, without step-"):
        made.check_bundle(tiny_bundle)
    graphs = (*manifest.step_graphs(), CONDITIONING, UPDATE)
    engines = [replace(made.engines[0], graph=g, source=source_of(manifest, g, True)) for g in graphs]
    replace(made, engines=tuple(engines)).check_bundle(tiny_bundle)
    engines[0] = replace(engines[0], source="of another")
    with pytest.raises(L2CError, match="were built from another step-"):
        replace(made, engines=tuple(engines)).check_bundle(tiny_bundle)


def test_the_folders_of_a_bundles_engines_are_found(tmp_path, tiny_bundle):
    bundle = replace(tiny_bundle, path=tmp_path)
    assert find_engines(bundle) == []
    made = write_engines(tmp_path / ENGINES / "rtx-1.7-sm86+sm89")
    (tmp_path / ENGINES / "broken").mkdir()
    (tmp_path / ENGINES / "broken" / RECORD).write_text("{")
    assert find_engines(bundle) == [(tmp_path / ENGINES / made.folder, made)]
    ((folder, error),) = unread_engines(bundle)
    assert folder.name == "broken"
    assert "is damaged" in str(error)


def test_an_archive_is_compared_with_its_record(tmp_path):
    made = write_engines(tmp_path)
    check_archive(tmp_path, made)
    path = tmp_path / "plans.xz"
    data = path.read_bytes()
    for damage in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damage)
        with pytest.raises(L2CError, match=r"plans.xz does not match its digest; copy the bundle"):
            check_archive(tmp_path, made)
    path.unlink()
    with pytest.raises(L2CError, match=r"cannot read .*plans.xz: No such file or directory; copy"):
        check_archive(tmp_path, made)
