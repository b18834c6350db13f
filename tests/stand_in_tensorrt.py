"""The real Python API of TensorRT without its libraries, which want a GPU and gigabytes.

The bindings are a small wheel that links to three libraries. Empty ones in their place let it import,
so that what our code touches can be looked up in the module that users have.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

VERSIONS = (
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu13-bindings==10.13.3.9",
    "tensorrt-cu13-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.0.0.114",
    "tensorrt-cu13-bindings==11.4.0.106",
)
"""Oldest and newest release that the code serves, and where the API changed in between."""

_SYMBOLS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
]


def install(requirement: str, folder: Path) -> dict[str, str]:
    """Unpack a release's bindings; return the environment in which they import.

    Skips the test where there is no registry or no compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the stand-ins for TensorRT's libraries need a C compiler (cc)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q"]
    got = subprocess.run([*pip, "-d", str(folder), requirement], capture_output=True, text=True)
    wheels = glob.glob(f"{folder}/*.whl")
    if not wheels:
        pytest.skip(f"cannot download {requirement}: {(got.stderr.strip().splitlines() or ['?'])[-1]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    source, library = folder / "empty.c", folder / "empty.so"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in _SYMBOLS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    major = requirement.partition("==")[2].split(".")[0]
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        shutil.copy(library, folder / f"{name}.so.{major}")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
