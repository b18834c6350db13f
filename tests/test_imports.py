"""What may import what: the runtime lives without torch, and the command line starts quickly."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import handmade
import pytest

import l2c_export

PACKAGE = Path(l2c_export.__file__).parent
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "PIL", "sklearn"}
HEAVY |= {"tensorrt", "tensorrt_rtx", "cuda"}
NOT_FOR_THE_RUNTIME = (HEAVY - {"onnxruntime"}) | {"click", "safetensors", "filelock"}


def modules_after(code: str, *arguments: str) -> set[str]:
    """Names of all modules that a fresh interpreter has imported after running code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_the_runtime_loads_and_runs_a_bundle_with_numpy_and_onnxruntime_alone(tmp_path):
    bundle = handmade.write_bundle(tmp_path / "bundle")
    code = f"""
import sys
for name in {sorted(NOT_FOR_THE_RUNTIME)}:
    sys.modules[name] = None  # importing it fails, even where somebody would catch that
from l2c_export.runtime import Runner
assert Runner.load(sys.argv[1]).sample([1, 2], seed=0).shape == (2, 3, 4, 4)
for name in {sorted(NOT_FOR_THE_RUNTIME)}:
    del sys.modules[name]
"""
    modules = modules_after(code, str(bundle))
    assert "onnxruntime" in modules
    assert not modules & NOT_FOR_THE_RUNTIME


def test_the_runtime_imports_no_backend_before_one_is_asked_for():
    modules = modules_after("import l2c_export.runtime")
    assert not modules & (NOT_FOR_THE_RUNTIME | HEAVY)


def test_engines_are_made_without_torch():
    code = "import importlib, pkgutil, l2c_export.engines as zone\n"
    code += "for m in pkgutil.iter_modules(zone.__path__, zone.__name__ + '.'):\n"
    code += "    importlib.import_module(m.name)"
    assert not modules_after(code) & {"torch", "onnxscript", "tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize("command", [[], ["--help"], ["run", "--help"], ["inspect", "--help"]])
def test_the_command_line_starts_without_heavy_packages(command):
    code = f"from l2c_export.cli import cli\ncli.main({command}, standalone_mode=False)"
    modules = modules_after(code if command else "import l2c_export.cli")
    assert not modules & HEAVY


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("l2c_export")}


@pytest.mark.parametrize(
    ("zone", "walls"),
    [
        ("core", ["build", "engines", "runtime", "train", "evidence", "cli"]),
        ("runtime", ["build", "engines", "train", "evidence", "cli"]),
        ("engines", ["build", "runtime", "train", "evidence", "cli"]),
        ("build", ["engines", "runtime", "cli"]),
        ("evidence", ["cli"]),
    ],
)
def test_the_zones_keep_apart(zone, walls):
    files = sorted((PACKAGE / zone).rglob("*.py"))
    assert files
    for path in files:
        for wall in walls:
            across = [n for n in imports(path) if f"{n}.".startswith(f"l2c_export.{wall}.")]
            assert not across, f"{path.relative_to(PACKAGE)} imports {across}"
