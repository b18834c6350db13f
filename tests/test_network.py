"""The networks that engines are built from, run in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from safetensors.numpy import load_file

from l2c_export.core.bundle import CONDITIONING, WEIGHTS
from l2c_export.core.engines import update_coefficients
from l2c_export.engines import network
from l2c_export.engines.network import engine_network, update_network

SIZES = {"batch": 2, "rows": 4, "n": 3}


def arrays(values, seed=0):
    """A value for each input, of the sizes above."""
    rng = np.random.default_rng(seed)
    made = {}
    for value in values:
        shape = [SIZES.get(size, size) for size in value.shape]
        drawn = rng.integers(0, 10, shape) if value.dtype == "int64" else rng.normal(size=shape)
        made[value.name] = drawn.astype(value.dtype)
    return made


def weights_of(bundle, net):
    """The weight inputs as the runner binds them: the file's bytes, under the network's shape."""
    stored = load_file(bundle.path / WEIGHTS)
    return {v.name: stored[v.name].reshape(v.shape) for v in net.weights}


def run(model, feeds):
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_every_network_computes_exactly_what_its_graph_computes(tiny_bundle):
    for graph in (*tiny_bundle.manifest.step_graphs(), CONDITIONING):
        net = engine_network(tiny_bundle, graph)
        onnx.checker.check_model(net.model, full_check=True)
        feeds = arrays(net.inputs)
        ours = run(net.model, feeds | weights_of(tiny_bundle, net))
        for value, mine, theirs in zip(
            net.outputs, ours, run(str(tiny_bundle.file(graph)), feeds), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"{graph} {value.name}")


def test_a_networks_interface_is_the_manifests_and_then_the_weights(tiny_bundle):
    for graph in (*tiny_bundle.manifest.step_graphs(), CONDITIONING):
        net, entry = engine_network(tiny_bundle, graph), tiny_bundle.manifest.graphs[graph]
        assert (net.inputs, net.outputs) == (entry.inputs, entry.outputs)
        names = [value.name for value in onnx.load_from_string(net.model).graph.input]
        assert names == [value.name for value in (*net.inputs, *net.weights)]


def test_operands_of_matrix_products_are_inputs_and_small_parameters_constants(tiny_bundle):
    net = engine_network(tiny_bundle, tiny_bundle.manifest.uncached)
    shapes = {value.name: value.shape for value in net.weights}
    assert shapes["blocks.0.attn.qkv.weight"] == (96, 32)
    assert shapes["blocks.0.attn.qkv.bias"] == (1, 96)
    names = {value.name for value in net.constants}
    assert names == {"pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias"}


def test_a_parameter_over_the_limit_is_an_input_whatever_reads_it(tiny_bundle, monkeypatch):
    monkeypatch.setattr(network, "INLINED", 0)
    net = engine_network(tiny_bundle, CONDITIONING)
    assert net.constants == ()
    assert "y_embedder.embedding_table.weight" in {value.name for value in net.weights}


def test_all_parameters_can_stay_constants_that_lie_in_the_weights_file(tiny_bundle, tmp_path):
    graph = tiny_bundle.manifest.uncached
    net = engine_network(tiny_bundle, graph, constant=True)
    assert net.weights == ()
    assert "blocks.0.attn.qkv.bias" in {value.name for value in net.constants}
    path = tmp_path / "constant.onnx"
    path.write_bytes(net.model)
    (tmp_path / WEIGHTS).write_bytes((tiny_bundle.path / WEIGHTS).read_bytes())
    feeds = arrays(net.inputs)
    (mine,) = run(str(path), feeds)
    np.testing.assert_array_equal(mine, run(str(tiny_bundle.file(graph)), feeds)[0])


def test_a_step_graph_without_computed_slots_takes_the_weights_that_it_needs_alone(tiny_bundle):
    graphs = {len(engine_network(tiny_bundle, g).weights) for g in tiny_bundle.manifest.step_graphs()}
    assert min(graphs) == 2  # the final layer's
    assert max(graphs) == 18


def test_networks_are_the_same_bytes_every_time(tiny_bundle):
    graph = tiny_bundle.manifest.uncached
    assert engine_network(tiny_bundle, graph) == engine_network(tiny_bundle, graph)
    assert update_network(tiny_bundle.manifest) == update_network(tiny_bundle.manifest)


def test_the_update_of_a_call_is_the_sum_that_its_manifest_entry_says(tiny_bundle):
    manifest = tiny_bundle.manifest
    net = update_network(manifest)
    onnx.checker.check_model(net.model, full_check=True)
    feeds = arrays(net.inputs)
    for call, table in zip(manifest.calls, update_coefficients(manifest), strict=True):
        (got,) = run(net.model, feeds | {"coefficients": table})
        a, b = (np.float32(call.update["x"][source]) for source in ("x", "output"))
        np.testing.assert_array_equal(got, feeds["x"] * a + feeds["output"] * b)
