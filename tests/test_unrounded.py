"""int8 against the reference: faults that rounding hides are found without it, others with it."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import tiny
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from test_verify import consistent, edit_graph

from l2c_export.build.build import build_bundle
from l2c_export.build.checkpoint import random_checkpoint
from l2c_export.core.bundle import WEIGHTS, read_bundle
from l2c_export.errors import UnsupportedError
from l2c_export.evidence.unrounded import unrounded
from l2c_export.evidence.verify import TOLERANCES, Settings, verify
from l2c_export.evidence.verify_report import report_json, report_table
from l2c_export.runtime import Runner

WITHOUT = ", without rounding activations"


@pytest.fixture
def copy(int8_bundle, tmp_path):
    """A bundle to corrupt."""
    shutil.copytree(int8_bundle.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def check(path):
    return verify(Runner.load(path, threads=1), Settings(), threads=1)


def writer(path, slot):
    """Index and call of the first that writes a slot."""
    calls = read_bundle(path).manifest.calls
    return next((i, call) for i, call in enumerate(calls) if slot in call.writes)


def rounded(report):
    """What the comparison of the bundle as it is finds by itself."""
    return dataclasses.replace(report, unrounded=None).failure


def test_without_rounding_a_bundle_is_as_near_as_float32(int8_bundle):
    report = check(int8_bundle.path)
    assert report.failure is None
    assert report.unrounded.tolerance == TOLERANCES["float32"]
    assert report.unrounded.worst < 2e-5 < 1e-3 < report.worst
    assert [len(call.slots) for call in report.unrounded.cached] == [
        len(call.slots) for call in report.cached
    ]
    *_, what, line, verdict = report_table(report).splitlines()
    assert what.startswith("the bundle's own graphs and schedule on the CPU, without rounding")
    limits = "allowed: slots 1.0e-04, outputs 1.0e-04, latents 1.0e-04"
    assert line == f"        worst error {report.unrounded.worst:.1e}; {limits}"
    assert verdict.startswith("PASSED")
    assert limits not in verdict
    assert report_json(report, Runner.load(int8_bundle.path))["unrounded"] == report.unrounded.worst


def test_a_float32_bundle_runs_once(tiny_bundle):
    assert check(tiny_bundle.path).unrounded is None


def test_a_calibrated_bundle_is_as_near_as_float16(tiny_files, tmp_path):
    plan = tiny.plan(tiny_files, precision="int8-static")
    calibration = tiny.calibration(tmp_path / "calibration")
    bundle = build_bundle(tmp_path / "b", tiny.request(plan, calibration=calibration))
    report = check(bundle.path)
    assert report.failure is None
    assert report.unrounded.tolerance == TOLERANCES["float16"]
    assert report.unrounded.worst < report.worst / 4


# What rounding hides ----------------------------------------------------------------------------


def test_a_wrong_update_hides_behind_rounding(copy):
    calls = list(read_bundle(copy).manifest.calls)
    update = calls[2].update["x"]
    calls[2] = dataclasses.replace(calls[2], update={"x": update | {"output": update["output"] * 1.01}})
    consistent(copy, calls=tuple(calls))
    report = check(copy)
    assert rounded(report) is None
    assert report.failure.startswith("call 2 ")
    assert "the latent after it differs" in report.failure
    assert report.failure.endswith(WITHOUT)


def test_a_layer_that_is_slightly_off_hides_behind_rounding(copy):
    """In one graph the last layer of block 0's MLP puts out 3 % more."""
    index, call = writer(copy, "00.mlp")

    def scale(graph):
        name = next(i.name for i in graph.initializer if i.name.endswith("0.mlp.fc2.weight_scale"))
        for node in graph.node:
            for k, value in enumerate(node.input):
                node.input[k] = "scaled" if value == name else value
        graph.initializer.append(numpy_helper.from_array(np.float32(1.03), "factor"))
        graph.node.insert(0, helper.make_node("Mul", [name, "factor"], ["scaled"]))

    edit_graph(copy, call.graph, scale)
    report = check(copy)
    assert rounded(report) is None
    assert report.failure.startswith(f"call {index} ")
    assert "slot 00.mlp differs" in report.failure


def test_swapped_caches_name_the_slot_without_rounding(copy):
    call = read_bundle(copy).manifest.calls[5]

    def swap(graph):
        other = {"00.mlp": "01.mlp", "01.mlp": "00.mlp"}
        for node in graph.node:
            for k, name in enumerate(node.input):
                node.input[k] = other.get(name, name)

    edit_graph(copy, call.graph, swap)
    report = check(copy)
    assert report.failure.startswith("call 5 ")
    assert "because it reads slot 00.mlp wrongly" in report.failure


# What is seen with rounding alone ---------------------------------------------------------------


@pytest.mark.parametrize("steps", [-8, 8])
def test_a_wrong_zero_point_is_seen_with_rounding_alone(copy, steps):
    """The product of one layer takes its input as if it were rounded around another zero."""
    index, call = writer(copy, "00.attn")

    def move(graph):
        layer = next(
            n
            for n in graph.node
            if n.op_type == "MatMulInteger" and n.input[1].endswith("blocks.0.attn.proj.weight")
        )
        graph.initializer.append(numpy_helper.from_array(np.int32(steps), "steps"))
        at = list(graph.node).index(layer)
        zero = layer.input[2]
        moved = [
            helper.make_node("Cast", [zero], ["zero.wide"], to=onnx.TensorProto.INT32),
            helper.make_node("Add", ["zero.wide", "steps"], ["zero.moved"]),
            helper.make_node("Cast", ["zero.moved"], ["zero.narrow"], to=onnx.TensorProto.UINT8),
        ]
        for k, node in enumerate(moved):
            graph.node.insert(at + k, node)
        layer.input[2] = "zero.narrow"

    edit_graph(copy, call.graph, move)
    report = check(copy)
    assert report.unrounded.failure is None
    assert report.failure.startswith(f"call {index} ")
    assert "slot 00.attn differs" in report.failure


def test_weights_that_were_scaled_wrongly_are_found_by_the_checkpoint(int8_bundle, copy, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(dict(random_checkpoint(tiny.CONFIG, tiny.SEED).iter_tensors()), weights)
    scale = load_file(copy / WEIGHTS)["blocks.1.mlp.fc1.weight_scale"].numpy()
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data.replace(scale.tobytes(), (scale * 1.5).tobytes()))
    consistent(copy)
    assert check(copy).failure is None
    report = verify(Runner.load(copy, threads=1), Settings(checkpoint=weights), threads=1)
    assert "slot 01.mlp differs" in report.failure
    assert WITHOUT not in report.failure
    good = verify(Runner.load(int8_bundle.path, threads=1), Settings(checkpoint=weights), threads=1)
    assert good.failure is None


def test_a_graph_that_rounds_in_an_unknown_way_is_refused(copy):
    manifest = read_bundle(copy).manifest

    def round_output(graph):
        for name, number in (("step", np.float32(0.01)), ("zero", np.int8(0))):
            graph.initializer.append(numpy_helper.from_array(number, name))
        maker = next(node for node in graph.node if "output" in node.output)
        maker.output[list(maker.output).index("output")] = "exact"
        graph.node.append(helper.make_node("QuantizeLinear", ["exact", "step", "zero"], ["narrow"]))
        graph.node.append(helper.make_node("Cast", ["narrow"], ["output"], to=onnx.TensorProto.FLOAT))

    edit_graph(copy, manifest.uncached, round_output)
    runner = unrounded(read_bundle(copy), threads=1)
    with pytest.raises(UnsupportedError, match=r"take the rounding out of \['QuantizeLinear'\]"):
        runner.graph(manifest.uncached)
