"""Polygraphy on the networks of engines, by the commands that this program and its README name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from l2c_export.engines.build import EngineBuild
from l2c_export.engines.polygraphy import reduce_command
from l2c_export.engines.request import EngineRequest
from l2c_export.evidence.networks import write_networks

pytest.importorskip("polygraphy", reason="needs polygraphy: pip install 'l2c-export[debug]'")


def shell(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_networks_are_compared_on_the_inputs_of_a_real_call(tiny_bundle, tmp_path):
    functions = write_networks(EngineBuild(tiny_bundle, EngineRequest("ort")), tmp_path)
    name = next(call.graph for call in tiny_bundle.manifest.calls if call.reads)
    run = f"--onnxrt --data-loader-script inputs.py:{functions[name]}"
    shell(f"polygraphy run {name}.onnx {run} --save-outputs outputs.json", tmp_path)
    graph = shlex.quote(str(tiny_bundle.file(name)))
    said = shell(f"polygraphy run {graph} {run} --load-outputs outputs.json", tmp_path)
    assert "All outputs matched" in said
    assert "Pass Rate: 100.00%" in said


@pytest.mark.slow
def test_a_network_that_does_not_build_is_reduced_to_the_node_that_fails(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    pytest.importorskip("onnx_graphsurgeon", reason="needs onnx-graphsurgeon")
    operators = ["Gelu", "Neg", "Det", "Exp", "Abs"]  # TensorRT has no determinants
    names = ["x", *operators]
    nodes = [helper.make_node(operator, [names[i]], [operator]) for i, operator in enumerate(operators)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4])
    y = helper.make_tensor_value_info("Abs", TensorProto.FLOAT, ["batch"])
    graph = helper.make_graph(nodes, "graph", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    network = tmp_path / "step-1.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), network)
    shell(reduce_command("rtx", network, ("sm89", "sm120")), tmp_path)
    (left,) = onnx.load(tmp_path / "step-1.reduced.onnx").graph.node
    assert left.op_type == "Det"
