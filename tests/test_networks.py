"""The networks of engines as files, with what real calls feed them."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from l2c_export.cli import cli
from l2c_export.core.engines import UPDATE
from l2c_export.engines.build import EngineBuild
from l2c_export.engines.request import EngineRequest
from l2c_export.evidence.networks import SCRIPT, write_networks


@pytest.fixture(scope="module")
def build(tiny_bundle) -> EngineBuild:
    return EngineBuild(tiny_bundle, EngineRequest("ort"))


@pytest.fixture(scope="module")
def networks(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return folder, write_networks(build, folder)


def run(path, inputs) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in inputs.items() if name in taken})


def test_every_network_computes_what_the_bundles_graph_computes(build, networks):
    folder, functions = networks
    assert list(functions) == list(build.networks)
    script = runpy.run_path(str(folder / SCRIPT))
    for name, function in functions.items():
        (inputs,) = script[function]()
        found = run(folder / f"{name}.onnx", inputs)
        if name == UPDATE:
            assert len(found) == len(build.networks[UPDATE].outputs)
            continue
        for a, b in zip(found, run(build.bundle.file(name), inputs), strict=True):
            assert np.abs(b).max() > 0
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_inputs_are_those_of_the_first_call_of_each_graph(build, networks):
    folder, _ = networks
    calls = build.bundle.manifest.calls
    with np.load(folder / "conditioning.npz") as conditioning:
        assert set(conditioning["timestep"]) >= {call.timestep for call in calls}
    reading = next(call for call in calls if call.reads)
    with np.load(folder / f"{reading.graph}.npz") as step:
        assert set(reading.reads) <= set(step)
        assert all(np.abs(step[slot]).max() > 0 for slot in reading.reads)
        assert not any(name.endswith("weight") for name in step)


def test_types_that_numpy_lacks_are_written_without_inputs(tiny_bundle, tmp_path):
    build = EngineBuild(tiny_bundle, EngineRequest("ort"))
    network = build.networks[tiny_bundle.manifest.uncached]
    narrow = tuple(replace(value, dtype="bfloat16") for value in network.weights)
    build.networks[tiny_bundle.manifest.uncached] = replace(network, weights=narrow)
    functions = write_networks(build, tmp_path)
    assert set(functions.values()) == {""}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {SCRIPT, *(f"{name}.onnx" for name in functions)}


def test_the_command_says_how_to_go_on(tiny_bundle, tmp_path):
    folder = tmp_path / "networks"
    arguments = ["engines", str(tiny_bundle.path), "--backend", "ort", "--networks", str(folder)]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.stderr
    name = tiny_bundle.manifest.calls[0].graph
    function = name.replace("-", "_")
    assert f"polygraphy run {folder}/{name}.onnx --onnxrt" in shown.stdout
    assert f"--data-loader-script {folder}/{SCRIPT}:{function}" in shown.stdout
    said = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert said["inputs"][name] == function
    assert CliRunner().invoke(cli, [*arguments, "--dry-run"]).exit_code == 2


def test_networks_that_hold_their_weights_are_the_bundles_graphs(tiny_bundle, tmp_path):
    options = ["--backend", "ort", "--weights", "constants", "--networks", str(tmp_path / "n")]
    shown = CliRunner().invoke(cli, ["engines", str(tiny_bundle.path), *options])
    assert shown.exit_code == 1
    assert f"are there already: {tiny_bundle.path}/step-*.onnx" in shown.stderr
