"""What a machine can do, as ``l2c-export doctor`` says it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from l2c_export.cli import cli
from l2c_export.core.bundle import read_bundle
from l2c_export.core.engines import ENGINES, read_record, write_record
from l2c_export.engines import doctor
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.doctor import diagnose, diagnosis_text
from l2c_export.engines.gpus import Gpu
from l2c_export.engines.request import EngineRequest
from l2c_export.errors import UnsupportedError

CARD = Gpu("GeForce", (8, 9), 16 << 30, 12 << 30, "13.0")


@pytest.fixture(autouse=True)
def gpus(monkeypatch) -> list[Gpu]:
    """The machine's GPUs, which a test may add."""
    there: list[Gpu] = []

    def find():
        if not there:
            raise UnsupportedError("there is no GPU that CUDA can use")
        return tuple(there)

    monkeypatch.setattr(doctor, "find_gpus", find)
    return there


@pytest.fixture
def tensorrt(monkeypatch) -> dict[str, str]:
    """Installed backends and their versions, which a test may change."""
    installed = {"rtx": "1.7"}

    def version(backend):
        if backend not in installed:
            raise UnsupportedError(f"backend {backend!r} cannot import it; pip install it")
        return installed[backend]

    monkeypatch.setattr(doctor, "builder_version", version)
    targets = {"rtx": ("sm86", "sm89"), "trt": ()}
    monkeypatch.setattr(doctor, "builder_targets", lambda backend: targets[backend])
    return installed


def findings(*arguments) -> dict[str, tuple[bool, str]]:
    diagnosis = diagnose(*arguments)
    return {f.what: (f.able, f.detail) for f in (*diagnosis.findings, *diagnosis.engines)}


def test_a_machine_without_a_gpu_builds_for_rtx_and_runs_on_the_cpu(tensorrt):
    found = findings()
    assert found["build bundles"][0]
    assert found["build engines for rtx"] == (True, "1.7, on any machine, for sm86, sm89")
    assert found["build engines for trt"][1].endswith("pip install it")
    assert found["run on the CPU"][0]
    assert found["run with rtx"] == (False, "there is no GPU that CUDA can use")
    assert not found["run with ort-cuda"][0]
    assert "no GPU" in diagnosis_text(diagnose())
    assert diagnose().healthy


def test_looking_for_gpus_leaves_the_device_that_was_current(monkeypatch):
    from fake_cuda import OK, FakeRuntime

    from l2c_export.engines import gpus

    runtime = FakeRuntime()
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=OK)
    runtime.cudaGetDeviceCount = lambda: (OK, 2)
    runtime.cudaDriverGetVersion = lambda: (OK, 13010)
    monkeypatch.setattr(gpus.importlib, "import_module", lambda name: runtime)
    runtime.current = 1
    assert [gpu.target for gpu in gpus.find_gpus()] == ["sm89", "sm89"]
    assert runtime.current == 1
    runtime.current = 0
    gpus.find_gpus()
    assert runtime.current == 0


def test_a_machine_with_a_gpu_builds_and_runs_for_it(tensorrt, gpus):
    gpus.append(CARD)
    tensorrt["trt"] = "10.3"
    found = findings()
    assert found["build engines for trt"] == (True, "10.3, for sm89")
    assert found["run with trt"] == (True, "10.3")
    assert "GeForce, sm89, 12.00 GiB of 16.00 GiB free, driver for CUDA 13.0" in diagnosis_text(
        diagnose()
    )


def test_tensorrt_without_a_gpu_cannot_build(tensorrt):
    tensorrt["trt"] = "10.3"
    able, detail = findings()["build engines for trt"]
    assert not able
    assert "builds on the GPU that runs the engines: there is no GPU" in detail


def test_what_is_missing_comes_with_the_line_that_installs_it(tensorrt, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = findings()
    assert found["build bundles"][1].endswith("install with: pip install 'l2c-export[build]'")
    assert found["run on the CPU"][1].endswith("install with: pip install 'l2c-export[ort]'")
    assert not diagnose().healthy
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 4


def test_a_bundles_engines_are_held_against_the_machine(tensorrt, gpus, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    assert diagnose(bundle).engines == ()
    (made,) = EngineBuild(bundle, EngineRequest("ort")).run()
    folder = bundle.path / ENGINES / made.folder
    assert findings(bundle)[f"engines {made.folder}"] == findings()["run with ort-cuda"]
    assert not diagnose(bundle).healthy
    # the same plans under another name stand in for those of a GPU
    text = (folder / "engines.json").read_text()
    plans = (folder / "plans.xz").read_bytes()
    shutil.rmtree(folder)
    other = folder.with_name("rtx-1.7-sm86")
    other.mkdir()
    (other / "engines.json").write_text(text)
    (other / "plans.xz").write_bytes(plans)
    write_record(other, _as_rtx(read_record(other)))
    assert findings(bundle)["engines rtx-1.7-sm86"] == (False, "there is no GPU here")
    assert not diagnose(bundle).healthy
    gpus.append(CARD)
    assert findings(bundle)["engines rtx-1.7-sm86"] == (False, "built for sm86, this device is sm89")
    gpus[0] = Gpu("GeForce", (8, 6), 1, 1, "13.0")
    assert findings(bundle)["engines rtx-1.7-sm86"][0]
    (other / "plans.xz").write_bytes(b"")
    assert "plans.xz does not match its digest" in findings(bundle)["engines rtx-1.7-sm86"][1]
    (other / "plans.xz").write_bytes(plans)
    tensorrt["rtx"] = "1.8"
    assert "built with rtx 1.7, this machine has 1.8" in findings(bundle)["engines rtx-1.7-sm86"][1]
    result = CliRunner().invoke(cli, ["doctor", str(bundle.path), "--json"])
    assert result.exit_code == 4
    assert json.loads(result.stdout)["healthy"] is False


def test_networks_run_where_onnxruntime_has_cuda(tensorrt, gpus, tiny_bundle, tmp_path, monkeypatch):
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    (made,) = EngineBuild(bundle, EngineRequest("ort")).run()
    gpus.append(CARD)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    assert findings(bundle)[f"engines {made.folder}"][0]
    del providers[0]
    able, detail = findings(bundle)[f"engines {made.folder}"]
    assert not able
    assert "pip install onnxruntime-gpu" in detail


def test_a_damaged_record_is_a_finding(tensorrt, tiny_bundle, tmp_path):
    bundle = replace(tiny_bundle, path=tmp_path)
    record = tmp_path / ENGINES / "rtx-1.7-sm86" / "engines.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    able, detail = findings(bundle)["engines rtx-1.7-sm86"]
    assert not able
    assert f"{record} is damaged" in detail
    assert not diagnose(bundle).healthy


def test_engines_are_not_built_without_the_packages_that_make_networks(tensorrt, monkeypatch):
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnx_ir" else known(name))
    assert findings()["build engines for rtx"] == (
        False,
        "lacks onnx_ir; install with: pip install 'l2c-export[engines]'",
    )


def _as_rtx(made):
    return replace(made, backend="rtx", version="1.7", targets=("sm86",))
