"""Engines for a bundle: its step graphs or kinds of sub-layers, the conditioning, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

from l2c_export.core.bundle import CONDITIONING, WEIGHTS, Bundle
from l2c_export.core.engines import PORTABLE, PORTABLE_TARGETS, UPDATE, EngineSet
from l2c_export.core.plan_report import size
from l2c_export.core.precision import Precision, precision_of
from l2c_export.core.sublayers import Stage
from l2c_export.engines.folder import EngineFolder, Progress
from l2c_export.engines.gpus import find_gpus
from l2c_export.engines.network import (
    OPSET,
    Network,
    engine_network,
    narrow_products,
    update_network,
)
from l2c_export.engines.price import Price, price, price_sublayers
from l2c_export.engines.request import EngineRequest, check_precision
from l2c_export.engines.sublayers import Sublayers, cut_sublayers
from l2c_export.engines.tensorrt_api import builder_targets, builder_version
from l2c_export.errors import L2CError, UnsupportedError

_LOCK = ".l2c-lock"  # of the bundle, whoever writes to it

_TURING = "sm75"

_SMALLER = {"float32": "float16", "float16": "int8-weights", "bfloat16": "int8-weights"}
"""Precision to the next one whose weights take half the memory."""


class EngineBuild:
    """The engines of one bundle for one backend: first what they will cost, then they themselves.

    Attributes:
        bundle: The bundle.
        request: What was asked for.
        networks: Name of an engine's graph to what it is built from.
        stages: How a call runs them, where they are for each kind of sub-layer.
        price: What the engines will cost.
        other: What they would cost with the other choice of ``per``; None where there is no such.
        version: Of the backend.
        families: Targets that are built together; each becomes a folder.
    """

    def __init__(self, bundle: Bundle, request: EngineRequest) -> None:
        """Check the request against the bundle, the backend and this machine.

        Raises:
            L2CError: The bundle is not what was built, or the request makes no sense.
            UnsupportedError: The backend cannot build this here, or the price is over the limit.
        """
        manifest = bundle.manifest
        check_request(str(bundle.path), manifest.precision, request)
        self.bundle, self.request = bundle, request
        graphs = dict.fromkeys((CONDITIONING, *manifest.step_graphs(), manifest.uncached))
        bundle.check_files({WEIGHTS, *(manifest.graphs[graph].file for graph in graphs)})
        whole = {graph: engine_network(bundle, graph, request.constant) for graph in graphs}
        whole[UPDATE] = update_network(manifest)
        self.networks = whole
        self.stages: tuple[Stage, ...] = ()
        self.price = price(manifest, whole)
        self.other: Price | None = None
        if (cut := self._sublayers()) is not None:
            parts = cut.networks | {UPDATE: whole[UPDATE]}
            self.other = price_sublayers(manifest, self.price, parts, cut.stages)
            if request.per == "sublayer":
                self.networks, self.stages = parts, cut.stages
                self.price, self.other = self.other, self.price
        self.check_memory()
        ort = request.backend == "ort"
        self.version = f"opset{OPSET}" if ort else builder_version(request.backend)
        self.families = target_families(request, precision_of(manifest.precision))

    def _sublayers(self) -> Sublayers | None:
        """The networks for every schedule; None where nobody asked and there are none."""
        try:
            return cut_sublayers(self.bundle)
        except UnsupportedError:
            if self.request.per == "sublayer":
                raise
            return None

    def check_memory(self, scratch: int = 0, code: int = 0) -> None:
        """Hold what a session needs against the limit.

        Args:
            scratch: Bytes that engines need while they run, as far as they are built.
            code: Bytes of their plans.

        Raises:
            UnsupportedError: It is more than the limit.
        """
        price, manifest = self.price, self.bundle.manifest
        parts = {
            "weights": price.weights + price.constants,
            "caches": price.caches,
            "latents and conditioning": price.state,
            "scratch": scratch,
            "code": code,
        }
        check_limit(str(self.bundle.path), parts, self.request, manifest.precision, manifest.batch)

    def run(self, progress: Progress = lambda *_: None) -> tuple[EngineSet, ...]:
        """Build what is missing or stale.

        Raises:
            L2CError: The builder fails, another build is at work, or the folder cannot be written.
            UnsupportedError: The builder runs out of memory, or the engines need more than the limit.
        """
        made = []
        with own(self.bundle.path):
            for targets in self.families:
                networks = self.networks_for(targets)
                folder = EngineFolder(
                    self.bundle,
                    networks,
                    self.request,
                    self.version,
                    targets,
                    self.check_memory,
                    self.stages,
                )
                made.append(folder.run(progress))
        return tuple(made)

    def networks_for(self, family: tuple[str, ...]) -> dict[str, Network]:
        """Name of each engine to the network that it is built from for one of :attr:`families`."""
        if family == (_TURING,):
            return {name: narrow_products(network) for name, network in self.networks.items()}
        return self.networks


def check_request(name: str, precision: str, request: EngineRequest) -> None:
    """Refuse what no engines of a bundle can be.

    Raises:
        L2CError: Engines that serve many sub-layers are to hold weights.
        UnsupportedError: The precision is for ONNX Runtime on a CPU alone.
    """
    check_precision(name, precision, request.backend)
    if request.constant and request.per == "sublayer":
        raise L2CError("an engine that serves many sub-layers holds no weights: give no --weights")


def check_limit(
    name: str, parts: Mapping[str, int], request: EngineRequest, precision: str, batch: tuple[int, int]
) -> None:
    """Hold what a session needs against the limit.

    Args:
        name: The bundle.
        parts: Purpose to bytes of device memory.
        request: What engines are asked for.
        precision: Of the bundle.
        batch: Its smallest and largest number of latents in a call.

    Raises:
        UnsupportedError: It is more; says what would take less.
    """
    limit, total = request.max_vram, sum(parts.values())
    if limit is None or total <= limit:
        return
    ways = ["build the engines without --weights constants"] if request.constant else []
    if request.per == "sublayer":
        ways.append("build the engines with --per graph")
    bundles = ["a smaller --batch"] if batch[1] > 1 else []
    if smaller := _SMALLER.get(precision):
        bundles.append(f"--precision {smaller}")
    if bundles:
        ways.append(f"build the bundle with {' or '.join(bundles)}")
    each = " + ".join(f"{size(count)} {part}" for part, count in parts.items() if count)
    raise UnsupportedError(
        f"{name} needs {size(total)} of device memory or more ({each}), the limit is {size(limit)}: "
        + ", or ".join(ways or ["it has no smaller form; raise --max-vram"])
    )


def target_families(request: EngineRequest, precision: Precision) -> tuple[tuple[str, ...], ...]:
    """Targets that share engines, on this machine and for a bundle of this precision.

    TensorRT-RTX fuses no bias or activation into products for Turing, nor for a list with Turing in it,
    so Turing gets engines of its own.

    Raises:
        UnsupportedError: The backend does not build for a target.
    """
    if request.backend == "ort":
        if request.targets:
            raise UnsupportedError("the networks of ort-cuda are for any device: give no --target")
        return ((PORTABLE,),)
    if request.backend == "trt":
        return (_this_gpu(request.targets),)
    known = builder_targets(request.backend)
    if unknown := [target for target in request.targets if target not in known]:
        raise UnsupportedError(
            f"TensorRT-RTX does not build for {', '.join(unknown)}, only for {', '.join(known)}; "
            "for other GPUs use --backend trt on a machine that has one"
        )
    if precision.weights == "float8_e4m3fn":
        _check_float8(request.targets)
    others = tuple(target for target in request.targets if target != _TURING)
    if _TURING not in request.targets:
        return (others or (PORTABLE,),)
    if precision.slots != "float16":
        raise UnsupportedError(
            f"TensorRT-RTX multiplies float16 alone on sm75, and the bundle's slots are "
            f"{precision.slots}: build it with --precision float16, or leave sm75 out"
        )
    return ((_TURING,), others) if others else ((_TURING,),)


def _check_float8(targets: tuple[str, ...]) -> None:
    old: list[str] = []
    new: list[str] = []
    for target in targets or PORTABLE_TARGETS:
        (old if int(target.removeprefix("sm")) < 89 else new).append(target)
    if not old:
        return
    way = "leave them out" if targets else f"give --target {','.join(new)}"
    raise UnsupportedError(
        f"float8 needs sm89 or later, not {', '.join(old)}{'' if targets else ' of portable engines'}: "
        f"build the bundle with --precision int8-weights, or {way}"
    )


def _this_gpu(asked: tuple[str, ...]) -> tuple[str, ...]:
    """The target of the GPU here, for which alone TensorRT can build."""
    try:
        gpus = find_gpus()
    except UnsupportedError as error:
        raise UnsupportedError(
            f"TensorRT builds on the GPU that runs the engines: {error}; on a machine without one "
            "use --backend rtx"
        ) from None
    target = gpus[0].target
    if asked and asked != (target,):
        raise UnsupportedError(
            f"TensorRT builds for the GPU here alone, which is {target} ({gpus[0].name}), not for "
            f"{', '.join(asked)}; build on that machine, or use --backend rtx"
        )
    return (target,)


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Hold the bundle against other builds."""
    try:
        held = filelock.FileLock(folder / _LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise L2CError(f"another build is at work in {folder}; wait for it") from None
    except OSError as error:
        raise L2CError(
            f"cannot write to {folder}: {error.strerror or error}; "
            "copy the bundle to where you may write"
        ) from None
    with held:
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
