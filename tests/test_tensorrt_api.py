"""What our code uses of TensorRT exists in every release that it serves; and RTX really builds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_tensorrt

import l2c_export
from l2c_export.core.tensorrt_module import tensorrt_module
from l2c_export.errors import UnsupportedError

PACKAGE = Path(l2c_export.__file__).parent
USERS = [PACKAGE / "engines" / "tensorrt_api.py", PACKAGE / "runtime" / "device" / "tensorrt.py"]
"""The files that talk to TensorRT."""

CLASSES = {
    "builder": "Builder",
    "network_definition": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
"""In those files a variable of this name holds an object of this class."""

OPTIONAL = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ComputeCapability",
}
"""Of RTX alone; used behind a look for it."""


def used(path: Path) -> set[str]:
    """``Class.attribute`` and ``Enum.MEMBER`` that a file touches by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        names, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        if not isinstance(value, ast.Name):
            continue
        if value.id in CLASSES:
            found.add(f"{CLASSES[value.id]}.{names[0]}")
        elif value.id == "trt":
            found.add(".".join(names[:2]))
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
    return {name for path in USERS if path.exists() for name in used(path)}


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


def test_a_package_of_type_stubs_is_no_backend(monkeypatch):
    tensorrt_module.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys)("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    with pytest.raises(UnsupportedError, match="tensorrt is a stub"):
        tensorrt_module("trt")
    tensorrt_module.cache_clear()
