"""A small bundle made by hand, without torch and the exporter: the contract that a runner keeps.

Two blocks with two slots each, on 4 tokens of width 8; every branch is tanh(h W + c). :func:`reference`
computes the same trajectory in plain numpy.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from l2c_export.core.bundle import (
    CONDITIONING,
    WEIGHTS,
    File,
    Graph,
    Guidance,
    Manifest,
    ProgramCall,
    Slots,
    Value,
    write_manifest,
)
from l2c_export.core.files import sha256

LATENT = (3, 4, 4)
TOKENS, WIDTH, CLASSES = 4, 8, 10
SLOTS = ("00.attn", "00.mlp", "01.attn", "01.mlp")
SCALE = 1.5

# Reads and writes of each call: slots that live over one and over two calls, a buffer that is used
# twice, a call that reads everything, one that computes everything.
PROGRAM = (
    ({}, {"00.attn": 0, "01.mlp": 1}),
    ({"00.attn": 0}, {"00.mlp": 2, "01.attn": 3, "01.mlp": 1}),
    ({"00.attn": 0, "00.mlp": 2, "01.attn": 3, "01.mlp": 1}, {}),
    ({}, {}),
    ({}, {"01.attn": 0}),
    ({"01.attn": 0}, {}),
)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The model's tensors."""
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (int(np.prod(LATENT)), TOKENS * WIDTH),
        "out": (TOKENS * WIDTH, int(np.prod(LATENT))),
        "label": (CLASSES + 1, WIDTH),
        "time": (WIDTH,),
        **dict.fromkeys(SLOTS, (WIDTH, WIDTH)),
    }
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_bundle(folder: Path, *, guidance: bool = True, batch: tuple[int, int] = (1, 4)) -> Path:
    """Write the bundle, as a build would."""
    folder.mkdir(parents=True)
    tensors = weights()
    offsets = _write_weights(folder / WEIGHTS, tensors)
    steps = {_name(reads, writes): (tuple(reads), tuple(writes)) for reads, writes in PROGRAM}
    graphs = {CONDITIONING: _conditioning(folder, tensors, offsets)}
    for name, (reads, writes) in steps.items():
        graphs[name] = _step(folder, name, tensors, offsets, reads, writes, guidance)
    graphs["full"] = replace(graphs[_name({}, {})], file="full.onnx")
    (folder / "full.onnx").write_bytes(b"never loaded by a runner")
    angles = np.linspace(0.3, 0.9, len(PROGRAM))
    manifest = Manifest(
        generator="handmade 1",
        preset=None,
        model={"family": "handmade"},
        weights={"kind": "random", "seed": 0},
        schedule={"kind": "handmade", "removed": 6, "asked": 6},
        sampler="ddim",
        stochastic=False,
        latent=LATENT,
        classes=CLASSES,
        batch=batch,
        guidance=Guidance(SCALE, 3, CLASSES) if guidance else None,
        precision="float32",
        slots=Slots(SLOTS, (TOKENS, WIDTH), "float32"),
        buffers=4,
        full="full",
        uncached=_name({}, {}),
        graphs=graphs,
        calls=tuple(
            ProgramCall(
                _name(reads, writes),
                float(999 - 100 * i),
                {"x": {"x": float(np.cos(a)), "output": float(np.sin(a))}},
                reads,
                writes,
            )
            for i, ((reads, writes), a) in enumerate(zip(PROGRAM, angles, strict=True))
        ),
    )
    files = {p.name: File(p.stat().st_size, sha256(p)) for p in sorted(folder.iterdir())}
    write_manifest(folder, replace(manifest, files=files))
    return folder


def reference(
    labels: list[int], noise: np.ndarray, *, scale: float | None = SCALE, cached: bool = True
) -> np.ndarray:
    """The trajectory in float64; ``scale`` None is a bundle without guidance."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    x, stored = noise.astype(np.float64), {}
    rows = np.array(labels if scale is None else [*labels, *[CLASSES] * len(labels)])
    for i, (angle, (reads, writes)) in enumerate(
        zip(np.linspace(0.3, 0.9, len(PROGRAM)), PROGRAM, strict=True)
    ):
        c = w["label"][rows] + (999 - 100 * i) / 1000 * w["time"]
        inputs = x if scale is None else np.concatenate([x, x])
        h = (inputs.reshape(len(rows), -1) @ w["in"]).reshape(-1, TOKENS, WIDTH)
        for slot in SLOTS:
            branch = np.tanh(h @ w[slot] + c[:, None])
            if cached and slot in reads:
                branch = stored[slot]
            if cached and slot in writes:
                stored[slot] = branch
            h = h + branch
        out = (h.reshape(len(rows), -1) @ w["out"]).reshape(-1, *LATENT)
        if scale is not None:
            cond, null = np.split(out, 2)
            out = null + scale * (cond - null)
        x = np.cos(angle) * x + np.sin(angle) * out
    return x


def _name(reads: dict[str, int], writes: dict[str, int]) -> str:
    bits = "".join("r" if s in reads else "w" if s in writes else "c" for s in SLOTS)
    return f"step-{bits}"


def parameter(tensor: str) -> str:
    """What the weights file and the graphs call a tensor."""
    return {"label": "label_table", **{slot: f"w.{slot}" for slot in SLOTS}}.get(tensor, tensor)


def _write_weights(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """Write a safetensors file; return each tensor's offset in the file."""
    header, at = {}, 0
    for name, value in tensors.items():
        header[parameter(name)] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.tobytes())
    return {name: 8 + len(text) + header[parameter(name)]["data_offsets"][0] for name in tensors}


def _conditioning(folder: Path, tensors: dict, offsets: dict[str, int]) -> Graph:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Gather", ["label_table", "label"], ["row"]),
        helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        helper.make_node("Mul", ["column", "time_over_1000"], ["moved"]),
        helper.make_node("Add", ["row", "moved"], [CONDITIONING]),
    ]
    inputs = (Value("timestep", "float32", ("n",)), Value("label", "int64", ("n",)))
    outputs = (Value(CONDITIONING, "float32", ("n", WIDTH)),)
    constants = [
        _external("label_table", "label", tensors, offsets),
        helper.make_tensor("time_over_1000", TensorProto.FLOAT, [WIDTH], tensors["time"] / 1000),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    return _save(folder, CONDITIONING, nodes, inputs, outputs, constants)


def _step(
    folder: Path,
    name: str,
    tensors: dict,
    offsets: dict[str, int],
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    guidance: bool,
) -> Graph:
    from onnx import TensorProto, helper

    node = helper.make_node
    size = int(np.prod(LATENT))
    nodes = [
        node("Concat", ["x", "x"] if guidance else ["x"], ["twice"], axis=0),
        node("Reshape", ["twice", "flat"], ["pixels"]),
        node("MatMul", ["pixels", "in"], ["embedded"]),
        node("Reshape", ["embedded", "tokens"], ["h0"]),
        node("Unsqueeze", [CONDITIONING, "one"], ["c"]),
    ]
    for i, slot in enumerate(SLOTS):
        if slot not in reads:
            nodes += [
                node("MatMul", [f"h{i}", f"w.{slot}"], [f"a{i}"]),
                node("Add", [f"a{i}", "c"], [f"b{i}"]),
                node("Tanh", [f"b{i}"], [slot]),
            ]
        nodes.append(node("Add", [f"h{i}", slot], [f"h{i + 1}"]))
    nodes += [
        node("Reshape", [f"h{len(SLOTS)}", "flat"], ["last"]),
        node("MatMul", ["last", "out"], ["pixels_out"]),
        node("Reshape", ["pixels_out", "image"], ["both" if guidance else "output"]),
    ]
    if guidance:
        nodes += [
            node("Split", ["both"], ["cond", "null"], axis=0, num_outputs=2),
            node("Sub", ["cond", "null"], ["difference"]),
            node("Mul", ["difference", "guidance_scale"], ["scaled"]),
            node("Add", ["null", "scaled"], ["output"]),
        ]
    unused = len(reads) == len(SLOTS)  # then nothing is left of the conditioning
    if unused:
        nodes = [n for n in nodes if list(n.output) != ["c"]]
    slot_value = {s: Value(s, "float32", ("rows", TOKENS, WIDTH)) for s in SLOTS}
    inputs = (
        Value("x", "float32", ("batch", *LATENT)),
        *([] if unused else [Value(CONDITIONING, "float32", ("rows", WIDTH))]),
        *([Value("guidance_scale", "float32", (1,))] if guidance else []),
        *(slot_value[s] for s in reads),
    )
    outputs = (Value("output", "float32", ("batch", *LATENT)), *(slot_value[s] for s in writes))
    shapes = {"flat": [0, -1], "tokens": [0, TOKENS, WIDTH], "image": [-1, *LATENT], "one": [1]}
    assert size == 48
    constants = [
        *(helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in shapes.items()),
        _external("in", "in", tensors, offsets),
        _external("out", "out", tensors, offsets),
        *(_external(f"w.{s}", s, tensors, offsets) for s in SLOTS if s not in reads),
    ]
    return _save(folder, name, nodes, inputs, outputs, constants)


def _external(name: str, tensor: str, tensors: dict, offsets: dict[str, int]):
    from onnx import StringStringEntryProto, TensorProto

    value = tensors[tensor]
    where = {"location": WEIGHTS, "offset": offsets[tensor], "length": value.nbytes}
    return TensorProto(
        name=name,
        data_type=TensorProto.FLOAT,
        dims=value.shape,
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=k, value=str(v)) for k, v in where.items()],
    )


def _save(folder: Path, name: str, nodes, inputs, outputs, constants) -> Graph:
    import onnx
    from onnx import TensorProto, helper

    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def infos(values):
        return [helper.make_tensor_value_info(v.name, types[v.dtype], v.shape) for v in values]

    used = {n for node in nodes for n in node.input}
    constants = [c for c in constants if c.name in used]
    graph = helper.make_graph(nodes, name, infos(inputs), infos(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / f"{name}.onnx"))
    return Graph(f"{name}.onnx", inputs, outputs)
