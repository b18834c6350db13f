"""What most tests stand on: one export of a tiny model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from l2c_export.build.build import build_bundle
from l2c_export.core.bundle import Bundle
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
