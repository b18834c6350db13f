"""What a builder made of a network, from its own log: kernels, what each computes, memory.

An engine cannot be opened without the GPU that it is for. The builder's log can: with detailed
profiling it lists every kernel with the ONNX nodes inside, and all inputs and outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from l2c_export.core.bundle import Value
from l2c_export.errors import L2CError

_DTYPES = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Int8": "int8",
    "Int32": "int32",
    "Int64": "int64",
    "Bool": "bool",
    "UInt8": "uint8",
    "FP8": "float8_e4m3fn",
}

_NO_KERNEL = {"shape_call"}  # sizes, computed on the host before a run
_PRODUCTS = {"gemm", "runtime_fusion", "correlation"}  # kinds of kernels that multiply matrices

_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), "
    r"Inputs: \[(?P<inputs>.*?)\](?=, (?:Constants|Outputs): \[)"
)
_TENSOR = re.compile(r"\{ Name: ([^,]+),")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_IO = re.compile(
    r"^ Name: (?P<name>.+?), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), "
    r"Dimensions: \[(?P<shape>[^\]]*)\]"
)
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Kernel:
    """One launch on the device.

    Attributes:
        name: The builder's.
        kind: Its class, such as ``gemm``, ``kgen`` or ``runtime_fusion``.
        inputs: Tensors that it reads, network inputs by their own names.
        nodes: ONNX nodes that it computes, wholly or in part.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a log says of an engine.

    Attributes:
        kernels: In the order of a run.
        inputs: Of the engine, weights too; a dimension that varies is -1.
        outputs: Of the engine.
        scratch: Bytes of device memory while it runs.
        weights: Bytes of weights inside.
    """

    kernels: tuple[Kernel, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scratch: int
    weights: int


@dataclass(frozen=True)
class Fusion:
    """How well a network was fused.

    Attributes:
        kernels: In all.
        products: Linear layers that the network computes.
        attentions: Attentions that the network computes.
        fused_attentions: Kernels that compute an attention whole: scores, softmax and values.
        loose_biases: Kernels that add the bias of a linear layer after its product, instead of within.
        loose_activations: Kernels that compute a GELU after the product before it, instead of within.
    """

    kernels: int
    products: int
    attentions: int
    fused_attentions: int
    loose_biases: int
    loose_activations: int


def read_log(text: str) -> Inspection:
    """Read a builder's log.

    Raises:
        L2CError: It has no list of layers, as of a build that failed.
    """
    lines = text.splitlines()
    try:
        first, last = lines.index("Layers:"), lines.index("I/O Tensors:")
    except ValueError:
        raise L2CError("the builder's log lists no layers; was it a detailed build?") from None
    layers = [match for line in lines[first:last] if (match := _LAYER.match(line))]
    tensors = [match for line in lines[last:] if (match := _IO.match(line))]
    memory = {kind: int(size) for kind, size in _MEMORY.findall(text)}
    return Inspection(
        tuple(
            Kernel(
                match["name"],
                match["kind"],
                tuple(_TENSOR.findall(match["inputs"])),
                tuple(_NODE.findall(match.string)),
            )
            for match in layers
            if match["kind"] not in _NO_KERNEL
        ),
        tuple(_value(match) for match in tensors if match["mode"] == "Input"),
        tuple(_value(match) for match in tensors if match["mode"] == "Output"),
        memory.get("Activation", 0),
        memory.get("Weights", 0),
    )


def _value(match: re.Match[str]) -> Value:
    shape = tuple(int(size) for size in match["shape"].split(",") if size)
    return Value(match["name"], _DTYPES.get(match["dtype"], match["dtype"]), shape)


def fusion(inspection: Inspection, operators: Mapping[str, str], biases: Collection[str]) -> Fusion:
    """Judge an engine by the network that it was built from.

    Args:
        inspection: What the log says.
        operators: Node to operator, of the network.
        biases: Network inputs that are biases of linear layers.
    """
    count = Counter(operators.values())
    fused = loose_biases = loose_activations = 0
    for kernel in inspection.kernels:
        inside = Counter(operators.get(node, "") for node in kernel.nodes)
        fused += bool(inside["Attention"] or (inside["Softmax"] and inside["MatMul"] >= 2))
        if kernel.kind not in _PRODUCTS:  # a part of a Gemm that is in such a kernel is its bias
            loose_biases += not set(kernel.inputs).isdisjoint(biases)
            loose_activations += bool(inside["Gelu"])
    return Fusion(
        kernels=len(inspection.kernels),
        products=count["Gemm"],
        attentions=count["Attention"] + count["Softmax"],
        fused_attentions=fused,
        loose_biases=loose_biases,
        loose_activations=loose_activations,
    )


def check_interface(inspection: Inspection, inputs: Iterable[Value], outputs: Iterable[Value]) -> None:
    """See that an engine takes and gives what its network does: a builder may have cast it silently.

    Raises:
        L2CError: It does not; with the first difference.
    """
    for wanted, built in ((inputs, inspection.inputs), (outputs, inspection.outputs)):
        found = {value.name: value for value in built}
        for value in wanted:
            shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
            expected = Value(value.name, value.dtype, shape)
            if (got := found.pop(value.name, None)) != expected:
                raise L2CError(f"the engine has {got} where the network has {expected}")
        if found:
            raise L2CError(f"the engine has {', '.join(found)}, which the network has not")
