"""The networks that engines are built from, and the inputs of real calls, for Polygraphy and its like.

``verify`` names the first call and slot that an engine gets wrong; what looks inside of one network
needs the network as a file and something to feed it. Its weights are inputs, so the random values that
such tools make by themselves would not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import WEIGHTS, Bundle
from l2c_export.core.engines import UPDATE, update_coefficients
from l2c_export.core.files import replacing
from l2c_export.engines.build import EngineBuild
from l2c_export.errors import L2CError
from l2c_export.evidence.verify import draw_inputs
from l2c_export.runtime import Runner
from l2c_export.runtime.backends import LoadedGraph, load_backend
from l2c_export.runtime.session import Session

Arrays = dict[str, NDArray[Any]]

SCRIPT = "inputs.py"

_HEAD = '''"""What each network beside this file takes; written by l2c-export."""

from pathlib import Path

from l2c_export.evidence.networks import load_inputs

BUNDLE = Path({!r})  # its weights are inputs of the networks
'''

_FUNCTION = """

def {function}():
    return load_inputs(Path(__file__).with_name("{name}.onnx"), BUNDLE)
"""


def write_networks(build: EngineBuild, folder: Path, seed: int = 0) -> dict[str, str]:
    """Write ``NAME.onnx`` for each engine, its inputs but the weights as ``NAME.npz``, and a script.

    The inputs are those of a trajectory that the bundle runs on the CPU, at the first call of each
    graph; those of the sampler's update are random, for it is a sum. A function of the script yields
    what one network takes, as ``polygraphy run --data-loader-script inputs.py:FUNCTION`` asks for it.

    Args:
        build: Whose networks; nothing is built.
        folder: Where to; made if it is not there.
        seed: Of labels and noise.

    Returns:
        Name of each network to its function, or to ``""`` where numpy lacks a type of its inputs.

    Raises:
        L2CError: They would hold their weights, or are of sub-layers; or the bundle does not run.
    """
    bundle = build.bundle
    if build.request.constant:
        raise L2CError(f"networks that hold their weights are there already: {bundle.path}/step-*.onnx")
    if build.stages:
        raise L2CError("inputs of real calls are those of step graphs: leave --per sublayer out")
    networks = build.networks_for(build.families[-1])
    types = {value.dtype for n in networks.values() for value in (*n.inputs, *n.weights)}
    recorded = _recorded(bundle, seed) if all(map(_is_numpys, types)) else {}
    functions = {name: re.sub(r"\W", "_", name) if name in recorded else "" for name in networks}
    for name, network in networks.items():
        with replacing(folder / f"{name}.onnx") as path:
            path.write_bytes(network.model)
        if name in recorded:
            with replacing(folder / f"{name}.npz") as path:
                np.savez(path, **{v.name: recorded[name][v.name] for v in network.inputs})  # type: ignore[arg-type]
    text = _HEAD.format(str(bundle.path.resolve()))
    text += "".join(_FUNCTION.format(function=f, name=n) for n, f in functions.items() if f)
    with replacing(folder / SCRIPT) as path:
        path.write_text(text, encoding="utf-8")
    return functions


def load_inputs(network: Path, bundle: Path) -> list[Arrays]:
    """What a network takes, weights and all: one set of inputs.

    Args:
        network: ``NAME.onnx``, with ``NAME.npz`` beside it.
        bundle: Whose weights it takes.
    """
    import onnx
    from safetensors import safe_open

    with np.load(network.with_suffix(".npz")) as file:
        held: Arrays = dict(file)
    with safe_open(bundle / WEIGHTS, framework="numpy") as weights:
        for value in onnx.load(network).graph.input:
            if value.name not in held:
                shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
                held[value.name] = weights.get_tensor(value.name).reshape(shape)
    return [held]


def _is_numpys(dtype: str) -> bool:
    return dtype not in ("bfloat16", "float8_e4m3fn")


class _Recorder:
    """The graphs of a runner; keeps what each takes when it first runs, and what it makes."""

    def __init__(self, runner: Runner) -> None:
        self.manifest = runner.manifest
        self.values: dict[str, Arrays] = {}
        self._runner = runner

    def graph(self, name: str) -> LoadedGraph:
        """A graph that is watched."""
        return _Watched(self._runner.graph(name), self.values.setdefault(name, {}))


class _Watched:
    def __init__(self, graph: LoadedGraph, kept: Arrays) -> None:
        self._graph, self._kept = graph, kept

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        run = self._graph.bind(inputs, outputs)

        def watched() -> None:
            first = not self._kept
            if first:
                self._kept.update({name: array.copy() for name, array in inputs.items()})
            run()
            if first:
                self._kept.update({name: array.copy() for name, array in outputs.items()})

        return watched


def _recorded(bundle: Bundle, seed: int) -> dict[str, Arrays]:
    """Inputs and outputs of each graph of the program, with and without caching, and of the update."""
    manifest = bundle.manifest
    watch = _Recorder(Runner(bundle, load_backend("ort", bundle)))
    labels, noise = draw_inputs(manifest, None, None, seed)
    session = Session(watch, len(labels))
    for cached in (True, False):
        session.start(labels, seed=seed, cached=cached)
        session.run() if cached else session.step()
    random = np.random.default_rng(seed)
    update = {"coefficients": update_coefficients(manifest)[len(manifest.calls) // 2]}
    for source in ("x", "output", "noise", "history", "history2"):
        update[source] = random.standard_normal(noise.shape, np.float32)
    return watch.values | {UPDATE: update}
