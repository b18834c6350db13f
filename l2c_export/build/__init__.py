"""From a checkpoint and a schedule to a bundle. May import torch, onnx and onnx_ir."""
