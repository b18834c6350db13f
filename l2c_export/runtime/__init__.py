"""Runs bundles with numpy and one backend; never imports torch or onnx."""

from l2c_export.runtime.runner import Runner
from l2c_export.runtime.session import CallResult, Session

__all__ = ["CallResult", "Runner", "Session"]
