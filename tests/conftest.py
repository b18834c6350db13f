"""What most tests stand on: one export of a tiny model, made once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import tiny
import torch

from l2c_export.build import build as build_module
from l2c_export.build.build import build_bundle
from l2c_export.build.export import export_full
from l2c_export.cli import main
from l2c_export.core.bundle import Bundle
from l2c_export.core.calibration import Calibration
from l2c_export.core.models import DiTConfig, UViTConfig
from l2c_export.core.plan import Plan


@pytest.fixture(scope="session")
def tiny_config() -> DiTConfig:
    return tiny.CONFIG


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> Path:
    """A folder with ``model.json`` and ``router.safetensors``."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_files(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_plan(tiny_files) -> Plan:
    return tiny.plan(tiny_files)


@pytest.fixture(scope="session")
def tiny_calibration(tmp_path_factory) -> Calibration:
    """Of the weights of ``tiny_bundle``."""
    return tiny.calibration(tmp_path_factory.mktemp("tiny-calibration"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_plan, tmp_path_factory) -> Bundle:
    """Random weights, one or two latents, guidance. Copy it before changing it."""
    return build_bundle(tmp_path_factory.mktemp("tiny-bundle") / "bundle", tiny.request(tiny_plan))


@pytest.fixture(scope="session")
def int8_bundle(tiny_files, tmp_path_factory) -> Bundle:
    """The same in int8."""
    plan = tiny.plan(tiny_files, precision="int8")
    return build_bundle(tmp_path_factory.mktemp("int8") / "bundle", tiny.request(plan))


@pytest.fixture(scope="session")
def int8_uvit_bundle(tmp_path_factory) -> Bundle:
    """A U-ViT in int8, four calls without reuse."""
    folder = tmp_path_factory.mktemp("int8-uvit")
    model = UViTConfig(
        depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=10, mlp_ratio=2.0
    )
    tiny.write_files(folder, model)
    plan = tiny.plan(folder, uncached=True, steps=4, precision="int8")
    return build_bundle(folder / "bundle", tiny.request(plan))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["l2c-export", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _exports() -> Iterator[None]:
    """Export what is the same only once: it takes seconds, and most tests are of what comes after."""
    known: dict[object, bytes] = {}

    def export_once(config, layout, *, guidance, batch) -> ir.Model:
        key = (config, layout.precision, guidance, batch)
        if key not in known:
            model = export_full(config, layout, guidance=guidance, batch=batch)
            known[key] = ir.to_proto(model).SerializeToString()
        return ir.from_proto(onnx.load_from_string(known[key]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "export_full", export_once)
        yield


@pytest.fixture
def exported_anew(monkeypatch) -> None:
    """Builds export, whatever was exported before."""
    monkeypatch.setattr(build_module, "export_full", export_full)
