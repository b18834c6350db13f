"""ONNX Runtime behind TensorRT's execution contexts: on a GPU, or on host memory as a look-alike.

The networks are those that engines are built from, with their weights as inputs; so every session
uses the one copy of the weights that the runner has uploaded. On a GPU, ONNX Runtime keeps a CUDA graph
of each set of addresses by itself, and cannot take part in another one: a capture around it fails
(https://github.com/microsoft/onnxruntime/pull/32081).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from l2c_export.core.bundle import multiple
from l2c_export.core.engines import Engine as Record
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.runtime.device.host import HostDevice, Work
from l2c_export.runtime.device.memory import item_bytes
from l2c_export.runtime.device.protocols import Context

CUDA_PROVIDER = "CUDAExecutionProvider"

VERSION: str = ort.__version__

NETWORKS = "opset20"
"""Version of an engine set of the backend ``"ort"``: its plans are plain ONNX networks, which any ONNX
Runtime and any device takes."""

_UNKNOWN_TO_NUMPY = {"bfloat16": 16, "float8_e4m3fn": 17}  # as onnx.TensorProto numbers them

_NO_GRAPH = -1  # kCudaGraphAnnotationSkip in onnxruntime/core/providers/cuda/cuda_graph.h

Address = int


def check_cuda() -> None:
    """See that this ONNX Runtime can use a GPU.

    Raises:
        UnsupportedError: It cannot; another package can.
    """
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise UnsupportedError(
            f"onnxruntime {VERSION} is the build without {CUDA_PROVIDER}; install the other: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )


class HostEngine:
    """A network on host memory: each of its runs is work for a stream of :class:`HostDevice`."""

    scratch = 4096  # which a run spoils, so that sharing it is put to the test

    def __init__(
        self, record: Record, model: bytes, folder: Path, device: HostDevice, threads: int | None
    ) -> None:
        self._record = record
        self._device = device
        options = _options(folder)
        options.intra_op_num_threads = threads or 0
        self._session = _open(record, model, options, ["CPUExecutionProvider"])

    def context(self, scratch: int, size: int, stream: int) -> Context:
        """A context that spoils the scratch memory at each run, as an engine would."""
        return _HostContext(self._record, self._session, self._device, (scratch, size), stream)


class CudaEngine:
    """A network on a GPU, where every context is a session of its own on the runner's stream."""

    scratch = 0  # ONNX Runtime has an arena of its own

    def __init__(self, record: Record, model: bytes, folder: Path, index: int, graphs: bool) -> None:
        self._record, self._model, self._folder = record, model, folder
        self._index, self._graphs = index, graphs

    def context(self, scratch: int, size: int, stream: int) -> Context:
        """A session whose kernels run on a stream."""
        options = _options(self._folder)
        # rather an error than copies to the host and back in every call
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        provider = {
            "device_id": str(self._index),
            "user_compute_stream": str(stream),
            "enable_cuda_graph": str(int(self._graphs)),
            "arena_extend_strategy": "kSameAsRequested",
        }
        session = _open(self._record, self._model, options, [(CUDA_PROVIDER, provider)])
        return _CudaContext(self._record, session, self._index)


class _Bound:
    """Shapes and addresses by name, as a context is told them."""

    def __init__(self, record: Record, session: ort.InferenceSession, place: tuple[str, int]) -> None:
        self.record = record
        self.session = session
        self._place = place
        self._inputs = {value.name: value for value in (*record.inputs, *record.weights)}
        self._outputs = {value.name: value for value in record.outputs}
        self._sizes: dict[str, int] = {}
        self.shapes = {
            name: shape
            for name, value in self._inputs.items()
            if (shape := tuple(d for d in value.shape if isinstance(d, int))) == value.shape
        }
        self.addresses: dict[str, Address] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Refuses what the network does not take."""
        value = self._inputs.get(name)
        if value is None or len(shape) != len(value.shape):
            return False
        for size, wanted in zip(shape, value.shape, strict=True):
            if isinstance(wanted, str):
                dimension, times = multiple(wanted)
                wanted = times * self._sizes.setdefault(dimension, size // times)
            if size != wanted:
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: Address) -> bool:
        """Refuses unknown names and addresses that TensorRT would not take."""
        if address % 256 or name not in self._inputs.keys() | self._outputs.keys():
            return False
        self.addresses[name] = address
        return True

    def complete(self) -> bool:
        """Whether every input has a shape, and every tensor an address."""
        names = self._inputs.keys() | self._outputs.keys()
        return self._inputs.keys() <= self.shapes.keys() and names <= self.addresses.keys()

    def ranges(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Address and bytes of each input and each output."""
        reads = [(self.addresses[n], self._bytes(n, v.dtype)) for n, v in self._inputs.items()]
        writes = [(self.addresses[n], self._bytes(n, v.dtype)) for n, v in self._outputs.items()]
        return tuple(reads), tuple(writes)

    def _bytes(self, name: str, dtype: str) -> int:
        return math.prod(self.shape(name)) * item_bytes(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an input or output, with the sizes that inputs have."""
        if name in self.shapes:
            return self.shapes[name]
        return self._outputs[name].sized(self._sizes)

    def binding(self) -> ort.IOBinding:
        """The addresses as ONNX Runtime wants them."""
        made = self.session.io_binding()
        for values, bind in ((self._inputs, made.bind_input), (self._outputs, made.bind_output)):
            for name, value in values.items():
                kind = _UNKNOWN_TO_NUMPY.get(value.dtype) or np.dtype(value.dtype).type
                bind(name, *self._place, kind, list(self.shape(name)), self.addresses[name])
        return made


class _HostContext:
    """A context over host memory; addresses are taken when it is enqueued, as a GPU takes them."""

    def __init__(
        self,
        record: Record,
        session: ort.InferenceSession,
        device: HostDevice,
        scratch: tuple[int, int],
        stream: int,
    ) -> None:
        self._bound = _Bound(record, session, ("cpu", 0))
        self._device, self._scratch, self._stream = device, scratch, stream
        self.set_input_shape = self._bound.set_input_shape
        self.set_tensor_address = self._bound.set_tensor_address

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Enqueue a run."""
        if not self._bound.complete() or stream_handle != self._stream:
            return False
        binding, (reads, writes) = self._bound.binding(), self._bound.ranges()
        device, scratch = self._device, self._scratch

        def run() -> None:
            for place in (*reads, *writes):
                device.view(*place)  # fails where it was given back
            device.view(*scratch).fill(0x5A)
            _run(self._bound, binding, ort.RunOptions())

        writes += (scratch,)
        device.submit(stream_handle, Work("run", self._bound.record.graph, reads, writes, run))
        return True


class _CudaContext:
    """A context over a GPU's memory; ONNX Runtime numbers the graphs that it keeps."""

    def __init__(self, record: Record, session: ort.InferenceSession, index: int) -> None:
        self._bound = _Bound(record, session, ("cuda", index))
        self._kept: dict[tuple[int, ...], tuple[ort.IOBinding, ort.RunOptions]] = {}
        self.set_input_shape = self._bound.set_input_shape
        self.set_tensor_address = self._bound.set_tensor_address

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Run: with addresses that it has seen before, as one graph."""
        if not self._bound.complete():
            return False
        key = tuple(self._bound.addresses.values())
        if key not in self._kept:
            self._kept[key] = (self._bound.binding(), _run_options(len(self._kept) + 1))
        _run(self._bound, *self._kept[key])
        return True

    def execute_once(self, stream_handle: int) -> bool:
        """Run with addresses that do not come again."""
        if not self._bound.complete():
            return False
        _run(self._bound, self._bound.binding(), _run_options(_NO_GRAPH))
        return True


def _run_options(graph: int) -> ort.RunOptions:
    """Of a run that becomes, or replays, the graph of a number, and that nobody waits for."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _run(bound: _Bound, binding: ort.IOBinding, options: ort.RunOptions) -> None:
    try:
        bound.session.run_with_iobinding(binding, options)
    except Exception as error:  # ONNX Runtime's own exceptions have no other common class
        text = " ".join(str(error).split())
        raise L2CError(f"onnxruntime {VERSION} failed in {bound.record.graph}: {text}") from None


def _options(folder: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # where a network that holds its weights refers to them
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    return options


def _open(
    record: Record, model: bytes, options: ort.SessionOptions, providers: list[object]
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers, enable_fallback=0)
    except Exception as error:  # as above
        text = " ".join(str(error).split())
        raise L2CError(f"onnxruntime {VERSION} cannot load {record.graph}: {text}") from None
