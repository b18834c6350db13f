"""The runtime: numpy and one backend; never torch, never onnx."""
