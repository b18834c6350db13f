"""Slots in bfloat16 on a device, seen from numpy, which has no such type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import handmade
import numpy as np
import onnx
import pytest
from handmade import LATENT, SLOTS, TOKENS, WIDTH
from networks import write_networks
from onnx import TensorProto, helper

from l2c_export.core.bundle import File, Graph, Value, read_bundle, write_manifest
from l2c_export.core.files import sha256
from l2c_export.errors import L2CError
from l2c_export.runtime import Runner
from l2c_export.runtime.device.bfloat16 import from_stored, to_stored


def narrow_slots(folder: Path) -> Path:
    """Let the graphs of the handmade bundle hand slots on in bfloat16; they compute in float32."""
    manifest = read_bundle(folder).manifest
    files, graphs = dict(manifest.files), {}
    steps = {name: manifest.graphs[name] for name in (*manifest.step_graphs(), manifest.uncached)}
    for name, graph in steps.items():
        path = folder / graph.file
        model = onnx.load(path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            if value.name in SLOTS:
                value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        for node in model.graph.node:
            node.input[:] = [f"{n}.wide" if n in SLOTS else n for n in node.input]
            node.output[:] = [f"{n}.wide" if n in SLOTS else n for n in node.output]
        for value in model.graph.input:
            if value.name in SLOTS:
                cast = helper.make_node(
                    "Cast", [value.name], [f"{value.name}.wide"], to=TensorProto.FLOAT
                )
                model.graph.node.insert(0, cast)
        model.graph.node.extend(
            helper.make_node("Cast", [f"{value.name}.wide"], [value.name], to=TensorProto.BFLOAT16)
            for value in model.graph.output
            if value.name in SLOTS
        )
        path.write_bytes(model.SerializeToString())
        files[graph.file] = File(path.stat().st_size, sha256(path))
        graphs[name] = Graph(graph.file, _narrow(graph.inputs), _narrow(graph.outputs))
    slots = replace(manifest.slots, dtype="bfloat16")
    write_manifest(folder, replace(manifest, slots=slots, graphs=manifest.graphs | graphs, files=files))
    return folder


def _narrow(values: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(replace(v, dtype="bfloat16") if v.name in SLOTS else v for v in values)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = narrow_slots(handmade.write_bundle(tmp_path_factory.mktemp("bfloat16") / "bundle"))
    write_networks(read_bundle(folder))
    return Runner.load(folder, "lookalike", 1).session(1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The same in float32, on the host."""
    folder = handmade.write_bundle(tmp_path_factory.mktemp("float32") / "bundle")
    return Runner.load(folder, threads=1).session(1)


def test_a_slot_is_read_in_float32(session, wide):
    for each in (session, wide):
        each.start([3], seed=0)
        each.step()
    found, exact = session.slot("00.attn"), wide.slot("00.attn")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, from_stored(to_stored(exact, "bfloat16"), "bfloat16"))
    assert 0 < np.abs(found - exact).max() < 2**-8


def test_a_call_takes_and_gives_float32(session, wide):
    x = np.random.default_rng(0).standard_normal((1, *LATENT), dtype=np.float32)
    slot = np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH), dtype=np.float32)
    for each in (session, wide):
        each.start([3], seed=0)
    rounded = from_stored(to_stored(slot, "bfloat16"), "bfloat16")
    output, writes = session.run_call(1, x, {"00.attn": slot})
    wanted, wanted_writes = wide.run_call(1, x, {"00.attn": rounded})
    np.testing.assert_allclose(output, wanted, atol=1e-6)
    for name, value in wanted_writes.items():
        assert writes[name].dtype == np.float32
        np.testing.assert_allclose(writes[name], value, rtol=2**-8, atol=1e-6)
    with pytest.raises(L2CError, match=r"slot 00\.attn is float64; this bundle needs float32: cast it"):
        session.run_call(1, x, {"00.attn": slot.astype(np.float64)})


def test_rounding_is_that_of_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    values[:4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 0, -1e-40  # halfway to either side, and denormal
    found = from_stored(to_stored(values, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(found, torch.from_numpy(values).bfloat16().float().numpy())
