"""The builders of TensorRT (10.3 to 11.x) and TensorRT-RTX behind one function.

What all releases have in common is used; the rest is looked for, never deduced from a version number.
Networks are strongly typed: the precision of an engine is that of its ONNX graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2c_export.core.files import replacing
from l2c_export.core.tensorrt_module import tensorrt_module
from l2c_export.errors import L2CError

Log = Callable[[str], None]
"""Takes one line of the builder's log."""

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input."""


@dataclass(frozen=True)
class BuildOptions:
    """What a builder is told besides the network.

    Attributes:
        targets: ``"sm89"`` … to build for ahead of time; empty for the builder's own choice.
        ranges: Inputs whose shape is not fixed.
        optimization_level: 0 to 5; None for the builder's own.
        workspace: Bytes of scratch that a kernel may take; None for no limit.
        tf32: Whether float32 products may be rounded to TF32.
        timing_cache: File of kernel timings, shared by builds; made if it is not there. RTX has none.
    """

    targets: tuple[str, ...] = ()
    ranges: dict[str, Range] = field(default_factory=dict)
    optimization_level: int | None = None
    workspace: int | None = None
    tf32: bool = False
    timing_cache: str | None = None


def builder_version(backend: str) -> str:
    """Version of the installed TensorRT or TensorRT-RTX.

    Raises:
        UnsupportedError: It is not installed.
    """
    version: str = tensorrt_module(backend).__version__
    return version


def builder_targets(backend: str) -> tuple[str, ...]:
    """What it can build for ahead of time; none where it builds for the GPU that it finds."""
    capabilities = getattr(tensorrt_module(backend), "ComputeCapability", None)
    names = capabilities.__members__ if capabilities is not None else ()
    return tuple(sorted((n.lower() for n in names if n[2:].isdigit()), key=lambda n: int(n[2:])))


def build_plan(
    backend: str, network: bytes, path: str, options: BuildOptions, log: Log = lambda _: None
) -> bytes:
    """Build one engine. A process should build one only: TensorRT ignores every later log.

    Args:
        backend: ``"trt"`` or ``"rtx"``.
        network: A serialised ``ModelProto``.
        path: Where external data is looked for beside, if the model has any.
        options: What else the builder is told.
        log: Called with each line, in the order of time.

    Raises:
        L2CError: It cannot be built; with the builder's own errors.
        UnsupportedError: The backend is not installed.
    """
    trt = tensorrt_module(backend)
    logger = _logger(trt, log)
    builder = _made(lambda: trt.Builder(logger), logger, "start")
    network_definition = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network_definition, logger)
    if not parser.parse(network, path):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{e.node_name()}: {e.desc()}" for e in errors) or _said(logger)
        raise L2CError(f"{trt.__name__} {trt.__version__} does not take the network: {reasons}")
    config = builder.create_builder_config()
    _configure(trt, builder, config, options)
    cache = _timing_cache(config, options)
    plan = _made(lambda: builder.build_serialized_network(network_definition, config), logger, "build")
    if cache is not None and options.timing_cache is not None:
        _keep_timings(config, Path(options.timing_cache))
    return bytes(memoryview(plan))


def _flags(trt: Any) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.STRONGLY_TYPED) if hasattr(kinds, "STRONGLY_TYPED") else 0


def _configure(trt: Any, builder: Any, config: Any, options: BuildOptions) -> None:
    config.max_aux_streams = 0  # kernels of one call wait for each other anyway
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for i, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    if options.ranges:
        profile = builder.create_optimization_profile()
        for name, shapes in options.ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)


def _timing_cache(config: Any, options: BuildOptions) -> Any:
    """Take the timings of earlier builds, if they are of this very GPU, for as long as this is held."""
    if options.timing_cache is None or hasattr(config, "set_compute_capability"):
        return None  # RTX compiles kernels on the target
    stored = b""
    with contextlib.suppress(OSError):
        stored = Path(options.timing_cache).read_bytes()
    for timings in (stored, b""):
        cache = config.create_timing_cache(timings)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _keep_timings(config: Any, path: Path) -> None:
    """Write the timings for later builds; one without them is only slower."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with contextlib.suppress(OSError), replacing(path) as temporary:
        temporary.write_bytes(bytes(memoryview(cache.serialize())))


def _made(make: Callable[[], Any], logger: Any, what: str) -> Any:
    """What a factory makes, or the builder's errors where it makes nothing."""
    try:
        made = make()
    except TypeError as error:  # pybind11's word for a factory that returned nothing
        raise L2CError(f"the builder does not {what}: {_said(logger) or error}") from None
    if made is None:
        raise L2CError(f"the builder does not {what}: {_said(logger)}")
    return made


def _said(logger: Any) -> str:
    return "; ".join(logger.errors)


@functools.cache
def _logger(trt: Any, log: Log) -> Any:
    """A logger that passes lines on, and keeps errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            log(message)

    return Logger()
