"""Verification: what is right passes, and every kind of fault is named by its call and slot."""

import dataclasses
import json
import math
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
import tiny
from click.testing import CliRunner

from l2c_export.build.build import build_bundle
from l2c_export.cli import cli
from l2c_export.core.bundle import WEIGHTS, File, read_bundle, write_manifest
from l2c_export.core.files import sha256
from l2c_export.core.sampler_call import is_stochastic
from l2c_export.core.samplers import SAMPLERS, sampler_table
from l2c_export.errors import L2CError, VerificationError
from l2c_export.evidence.compare import CallErrors, relative_error
from l2c_export.evidence.verify import Settings, verify
from l2c_export.evidence.verify_report import report_json, report_table
from l2c_export.runtime import Runner

SLOTS = ("00.attn", "00.mlp", "01.attn", "01.mlp")


@pytest.fixture(scope="module")
def report(tiny_bundle):
    return verify(Runner.load(tiny_bundle.path, threads=1), Settings())


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    """A bundle to corrupt."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def consistent(path, **changes):
    """Write the manifest again, so that digests fit whatever was done to the files."""
    manifest = dataclasses.replace(read_bundle(path).manifest, **changes)
    files = {
        name: File((path / name).stat().st_size, sha256(path / name), entry.key)
        for name, entry in manifest.files.items()
    }
    write_manifest(path, dataclasses.replace(manifest, files=files))


def edit_graph(path, graph, edit):
    """Change a graph of a bundle, by a function of its ONNX model."""
    file = path / read_bundle(path).manifest.graphs[graph].file
    model = onnx.load(file, load_external_data=False)
    edit(model.graph)
    file.write_bytes(model.SerializeToString())
    consistent(path)


def failure(path, **settings):
    """What a verification of the bundle finds first."""
    return verify(Runner.load(path, threads=1), Settings(**settings)).failure


def run(*arguments):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


# -- what is right -----------------------------------------------------------------------------


def test_a_bundle_equals_the_eager_model_in_every_call_and_slot(tiny_bundle, report):
    assert report.failure is None
    assert report.worst < 2e-5
    program = tiny_bundle.manifest.calls
    assert [call.graph for call in report.cached] == [call.graph for call in program]
    assert [set(call.slots) for call in report.cached] == [set(call.writes) for call in program]
    assert all(list(call.slots) == sorted(call.slots) for call in report.cached)
    assert len(report.uncached) == len(report.delta) == len(program)


def test_caching_moves_the_latent_from_the_first_reuse_on(report):
    assert report.delta[0] < 1e-6
    assert min(report.delta[1:]) > 1e-4


def test_a_bundle_without_guidance_and_of_another_batch_passes(tiny_files, tmp_path):
    plan = tiny.plan(tiny_files, guidance=False)
    bundle = build_bundle(tmp_path / "plain", tiny.request(plan, batch=(3, 3)))
    outcome = verify(Runner.load(bundle.path, threads=1), Settings())
    assert outcome.failure is None
    assert len(outcome.inputs["labels"]) == 3
    assert outcome.inputs["guidance_scale"] is None


def test_only_the_first_calls_are_compared_when_asked(tiny_bundle):
    outcome = verify(Runner.load(tiny_bundle.path, threads=1), Settings(calls=2, uncached=False))
    assert [call.index for call in outcome.cached] == [0, 1]
    assert outcome.uncached == outcome.delta == []


def test_the_table_fits_a_terminal_and_ends_with_the_verdict(report):
    lines = report_table(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("PASSED  worst error")


# -- what is wrong -----------------------------------------------------------------------------


def test_swapped_cache_inputs_name_the_call_and_the_slot(copy):
    """The last call reads all slots; two of its inputs are taken for each other."""
    calls = read_bundle(copy).manifest.calls
    assert set(calls[5].reads) == set(SLOTS)

    def swap(graph):
        for node in graph.node:
            for k, name in enumerate(node.input):
                node.input[k] = {"00.mlp": "01.mlp", "01.mlp": "00.mlp"}.get(name, name)

    edit_graph(copy, calls[5].graph, swap)
    found = failure(copy)
    assert found.startswith("call 5 (t = 0, step-")
    assert "because it reads slot 00.mlp wrongly" in found


def test_swapped_cache_outputs_name_the_call_and_the_slot(copy):
    calls = read_bundle(copy).manifest.calls
    index = next(i for i, call in enumerate(calls) if {"00.mlp", "01.mlp"} <= set(call.writes))

    def swap(graph):
        other = {"00.mlp": "01.mlp", "01.mlp": "00.mlp"}
        for node in graph.node:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    names[k] = other.get(name, name)

    edit_graph(copy, calls[index].graph, swap)
    found = failure(copy)
    assert found.startswith(f"call {index} ")
    assert "slot 00.mlp differs" in found


def test_a_graph_with_the_weights_of_another_block_names_its_first_slot(copy):
    """Block 1's attention runs with block 0's projection, in one graph only."""
    calls = read_bundle(copy).manifest.calls
    index = next(i for i, call in enumerate(calls) if "01.attn" in call.writes)

    def confuse(graph):
        named = {i.name: i for i in graph.initializer}
        source = next(named[n] for n in named if n.endswith("blocks.0.attn.proj.weight"))
        target = next(named[n] for n in named if n.endswith("blocks.1.attn.proj.weight"))
        del target.external_data[:]
        target.external_data.extend(source.external_data)

    edit_graph(copy, calls[index].graph, confuse)
    found = failure(copy)
    assert found.startswith(f"call {index} ")
    assert "slot 01.attn differs" in found


def test_a_changed_weight_is_found_by_the_original_checkpoint(copy, tmp_path):
    """By itself the bundle is consistent; against its checkpoint it is not."""
    weights = safetensors.torch.load_file(copy / WEIGHTS)
    safetensors.torch.save_file(weights, tmp_path / "original.safetensors")
    data = bytearray((copy / WEIGHTS).read_bytes())
    value = weights["blocks.0.attn.proj.weight"].numpy()
    at = data.index(value.tobytes())
    data[at : at + value.nbytes] = (value * 1.5).tobytes()
    del weights
    (copy / WEIGHTS).write_bytes(data)
    consistent(copy)
    assert failure(copy) is None
    found = failure(copy, checkpoint=tmp_path / "original.safetensors")
    assert found.startswith("call 0 ")
    assert "slot 00.attn differs" in found


def test_a_wrong_update_is_seen_in_the_latent_alone(copy):
    calls = list(read_bundle(copy).manifest.calls)
    update = calls[2].update["x"]
    update = update | {"output": update["output"] * 1.01}
    calls[2] = dataclasses.replace(calls[2], update={"x": update})
    consistent(copy, calls=tuple(calls))
    found = failure(copy)
    assert found.startswith("call 2 ")
    assert "the latent after it differs" in found
    assert "the update or the buffers are wrong" in found


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_update_of_every_sampler_is_compared(copy, name):
    """The tiny bundle's calls with the sampler's numbers; then each of its terms doubled."""
    manifest = read_bundle(copy).manifest
    model = manifest.model | {"prediction": SAMPLERS[name].prediction}
    table = sampler_table(name, len(manifest.calls))
    calls = tuple(
        dataclasses.replace(call, timestep=made.timestep, update=made.update)
        for call, made in zip(manifest.calls, table, strict=True)
    )
    facts = {"sampler": name, "stochastic": is_stochastic(table), "model": model}
    consistent(copy, calls=calls, **facts)
    outcome = verify(Runner.load(copy, threads=1), Settings(batch=1, tolerance=1e-5))
    assert outcome.failure is None
    assert outcome.worst > 0
    index = 2
    for target, terms in calls[index].update.items():
        for source in terms:
            wrong = calls[index].update | {target: terms | {source: terms[source] * 2}}
            changed = list(calls)
            changed[index] = dataclasses.replace(calls[index], update=wrong)
            consistent(copy, calls=tuple(changed), **facts)
            found = failure(copy, batch=1, uncached=False, calls=5)
            assert "the latent after it differs" in found, (target, source)
            assert found.startswith("call 2 " if target == "x" else ("call 3 ", "call 4 ")), found


def test_a_wrong_timestep_is_seen_in_its_call(copy):
    calls = list(read_bundle(copy).manifest.calls)
    calls[3] = dataclasses.replace(calls[3], timestep=calls[3].timestep + 20)
    consistent(copy, calls=tuple(calls))
    assert failure(copy).startswith("call 3 ")


def test_a_wrong_uncached_graph_is_named_as_such(copy):
    manifest = read_bundle(copy).manifest

    def confuse(graph):
        named = {i.name: i for i in graph.initializer}
        target = next(named[n] for n in named if n.endswith("blocks.1.mlp.fc1.weight"))
        source = next(named[n] for n in named if n.endswith("blocks.0.mlp.fc1.weight"))
        del target.external_data[:]
        target.external_data.extend(source.external_data)

    if manifest.uncached in manifest.step_graphs():
        pytest.skip("this plan's program runs the uncached graph too")
    edit_graph(copy, manifest.uncached, confuse)
    assert failure(copy).startswith("uncached call 0 ")


def test_weights_that_are_not_finite_fail(copy):
    weights = safetensors.torch.load_file(copy / WEIGHTS)
    data = bytearray((copy / WEIGHTS).read_bytes())
    at = data.index(weights["final_layer.linear.weight"].numpy().tobytes())
    del weights
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (copy / WEIGHTS).write_bytes(data)
    consistent(copy)
    outcome = verify(Runner.load(copy, threads=1), Settings())
    assert outcome.failure.startswith("call 0 ")
    assert "the output holds NaN or Inf" in outcome.failure
    assert math.isnan(outcome.worst)
    text = json.dumps(report_json(outcome, Runner.load(copy, threads=1)), allow_nan=False)
    assert json.loads(text)["worst"] == "nan"
    assert report_table(outcome).splitlines()[-1].startswith("FAILED")


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9, 0.0], [0.0, 0.0], math.inf),
    ],
)
def test_errors_are_relative_to_the_largest_value(value, reference, error):
    assert relative_error(np.array(value, np.float32), np.array(reference, np.float32)) == error


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error_on_either_side(bad):
    good, broken = np.ones(2, np.float32), np.array([1, bad], np.float32)
    assert math.isnan(relative_error(broken, good))
    assert math.isnan(relative_error(good, broken))
    assert math.isnan(relative_error(broken, broken))


def test_nan_is_worse_than_any_number():
    call = CallErrors(0, 0.0, "g", 0.0, {"00.attn": 1.0, "00.mlp": math.nan}, 0.0)
    assert call.worst_slot[0] == "00.mlp"


# -- the command -------------------------------------------------------------------------------


def test_the_command_passes_and_writes_its_report(copy):
    result = run(copy, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.output
    data = json.loads((copy / "reports" / "verify.json").read_text())
    assert data["passed"] is True
    assert len(data["calls"]) == 6
    assert Runner.load(copy).manifest.calls  # a report does not spoil the bundle


def test_the_command_fails_with_3_and_still_writes_its_report(copy, tmp_path):
    result = run(copy, "--threads", 1, "--tolerance", "1e-12", "--report", tmp_path / "r.json")
    assert result.exit_code == VerificationError.exit_code == 3
    assert "Error: verification FAILED in call 0" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is False


def test_the_command_prints_json(copy):
    result = run(copy, "--json", "--calls", 1, "--labels", "1,2", "--guidance-scale", 2)
    [line] = result.stdout.splitlines()
    inputs = json.loads(line)["inputs"]
    assert inputs["labels"] == [1, 2]
    assert inputs["guidance_scale"] == 2


def test_a_bundle_that_takes_no_report_is_verified_all_the_same(copy):
    (copy / "reports" / "verify.json").mkdir()
    result = run(copy, "--calls", 1, "--labels", "1")
    assert result.exit_code == 0, result.stderr
    assert "warning: cannot write the report" in result.stderr
    assert "choose another place with --report" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--labels", "x"], 2, "not a list of class labels"),
        (["--tolerance", "0"], 2, "tolerance"),
        (["--backend", "other"], 2, "--backend"),
        (["--labels", "99"], 1, "label 99 is not a class"),
        (["--batch", "7"], 1, "7 images in one batch"),
        (["--labels", "1,2", "--batch", "1"], 1, "2 labels do not make a batch of 1"),
        (["--guidance-scale", "nan"], 1, "finite"),
        (["--checkpoint", "missing.pt"], 1, "missing.pt"),
        (["--report", "{bundle}/l2c.json/x"], 1, "cannot write the report"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(tiny_bundle, arguments, code, message):
    result = run(tiny_bundle.path, *(a.format(bundle=tiny_bundle.path) for a in arguments))
    assert result.exit_code == code, result.output
    assert message in result.output


def test_an_unknown_precision_asks_for_a_tolerance(tiny_bundle):
    runner = Runner.load(tiny_bundle.path, threads=1)
    runner.manifest = dataclasses.replace(runner.manifest, precision="float8")
    with pytest.raises(L2CError, match="--tolerance"):
        verify(runner, Settings())
