"""What our code uses of TensorRT exists in every release that it serves; and RTX really builds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in_tensorrt

import l2c_export
from l2c_export.core.tensorrt_module import tensorrt_module
from l2c_export.engines.tensorrt_api import BuildOptions, _keep_timings, _timing_cache
from l2c_export.errors import UnsupportedError

PACKAGE = Path(l2c_export.__file__).parent
USERS = {
    PACKAGE / "engines" / "tensorrt_api.py": {
        "builder": "Builder",
        "network_definition": "INetworkDefinition",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
    },
    PACKAGE / "runtime" / "device" / "tensorrt.py": {
        "_runtime": "Runtime",
        "config": "IRuntimeConfig",
        "engine": "ICudaEngine",
        "_engine": "ICudaEngine",
        "cache": "IRuntimeCache",
    },
}
"""The files that talk to TensorRT, and of which class the objects are that a variable holds there."""

OPTIONAL = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "EngineValidity.INVALID",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
    "IRuntimeCache.deserialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
"""Of RTX alone; used behind a look for it."""


def used(path: Path, classes: dict[str, str]) -> set[str]:
    """``Class.attribute`` and ``Enum.MEMBER`` that a file touches by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            names.insert(0, node.id)
        names = names[1:] if names[:1] == ["self"] else names
        if len(names) > 1 and names[0] in classes:
            found.add(f"{classes[names[0]]}.{names[1]}")
        elif len(names) > 1 and names[0] in ("trt", "_trt"):
            found.add(".".join(names[1:3]))
    return found - {"__name__", "__version__"}


def missing(environment: dict[str, str] | None, module: str, names: set[str]) -> set[str]:
    """Those of the names that a fresh interpreter does not find in a module."""
    code = f"""
import json, operator, sys
import {module} as trt
def there(name):
    try:
        operator.attrgetter(name)(trt)
    except AttributeError:
        return False
    return True
print(json.dumps([name for name in json.loads(sys.argv[1]) if not there(name)]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sorted(names))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


def surface() -> set[str]:
    return {name for path, classes in USERS.items() for name in used(path, classes)}


def test_the_surface_is_read_from_the_code():
    assert {"Builder.build_serialized_network", "OnnxParser.parse", "BuilderFlag.TF32"} <= surface()
    assert "IBuilderConfig.max_aux_streams" in surface()


@pytest.mark.parametrize("requirement", stand_in_tensorrt.VERSIONS)
def test_tensorrt_has_all_that_is_used_of_it(requirement, tmp_path):
    environment = stand_in_tensorrt.install(requirement, tmp_path)
    names = surface()
    assert missing(environment, "tensorrt_bindings", names) <= OPTIONAL
    assert missing(environment, "tensorrt_bindings", {"Builder.no_such_thing"})


def test_rtx_has_all_that_is_used_of_it():
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    assert missing(None, "tensorrt_rtx", surface()) == set()


def test_a_backend_that_is_not_installed_says_how_to_install_it(monkeypatch):
    tensorrt_module.cache_clear()
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"'trt' cannot import tensorrt .*pip install tensorrt"):
        tensorrt_module("trt")
    tensorrt_module.cache_clear()


def test_on_a_jetson_tensorrt_comes_from_jetpack(monkeypatch, tmp_path):
    jetson = tmp_path / "nv_tegra_release"
    jetson.touch()
    monkeypatch.setattr("l2c_export.core.tensorrt_module._JETSON", jetson)
    tensorrt_module.cache_clear()
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="sudo apt install python3-libnvinfer"):
        tensorrt_module("trt")
    tensorrt_module.cache_clear()


def test_a_package_of_type_stubs_is_no_backend(monkeypatch):
    tensorrt_module.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    with pytest.raises(UnsupportedError, match="tensorrt is a stub"):
        tensorrt_module("trt")
    tensorrt_module.cache_clear()


class TimingConfig:
    """A builder's configuration as far as it knows of timings: it takes those of ``gpu`` alone."""

    def __init__(self, gpu: bytes, kept: bytes | None = b"") -> None:
        self.gpu, self.kept = gpu, kept
        self.taken: list[bytes] = []

    def create_timing_cache(self, stored: bytes) -> bytes:
        return stored

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        fits = cache in (b"", self.gpu)
        self.taken += [cache] * fits
        return fits

    def get_timing_cache(self):
        return None if self.kept is None else SimpleNamespace(serialize=lambda: self.kept)


def test_timings_of_another_gpu_are_not_taken_and_are_replaced(tmp_path):
    path = tmp_path / "timing.cache"
    options = BuildOptions(timing_cache=str(path))
    for stored, taken in ((None, b""), (b"L4", b"L4"), (b"H100", b"")):
        path.unlink(missing_ok=True)
        if stored is not None:
            path.write_bytes(stored)
        config = TimingConfig(b"L4", b"new")
        assert _timing_cache(config, options) == taken
        assert config.taken == [taken]
        _keep_timings(config, path)
        assert path.read_bytes() == b"new"


def test_a_build_does_not_fail_for_want_of_timings(tmp_path):
    path = tmp_path / "timing.cache"
    path.mkdir()
    assert _timing_cache(TimingConfig(b"L4"), BuildOptions(timing_cache=str(path))) == b""
    _keep_timings(TimingConfig(b"L4", b"new"), path)  # a folder cannot be replaced
    _keep_timings(TimingConfig(b"L4", None), tmp_path / "other.cache")
    assert not (tmp_path / "other.cache").exists()
