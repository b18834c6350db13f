"""Run a bundle with numpy and onnxruntime alone, and compare with the full installation."""

import importlib.util
import sys

import numpy as np

from l2c_export.runtime import Runner

bundle, expected = sys.argv[1:]
present = [
    name
    for name in ("torch", "onnx", "onnx_ir", "click", "safetensors")
    if importlib.util.find_spec(name)
]
assert not present, f"this environment has more than the runtime needs: {present}"
latents = Runner.load(bundle).sample([0, 1, 2, 3], seed=7)
error = np.abs(latents - np.load(expected)).max()
assert error < 1e-5, f"the runtime alone differs by {error}"
print(f"the runtime alone gives the same latents (largest difference {error:.1e})")
