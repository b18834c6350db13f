"""What a backend is to the runner, and which there are."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Bundle, Manifest
from l2c_export.errors import L2CError, UnsupportedError

if TYPE_CHECKING:
    from l2c_export.runtime.session import AnySession

Array = NDArray[Any]


class LoadedGraph(Protocol):
    """A graph that is ready to run; may be used by several threads at once."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Tie the graph to buffers.

        Args:
            inputs: Name to contiguous buffer, for every input of the graph.
            outputs: Name to contiguous buffer, for every output of the graph.

        Returns:
            A function that runs the graph once, reading and filling those very buffers. It keeps
            them alive, and is for one thread at a time.
        """


class Backend(Protocol):
    """Makes the graphs of one bundle runnable."""

    version: str
    """Name and version, as reports print them."""

    manifest: Manifest
    """The program that sessions run."""

    streams: bool
    """Whether sessions are on a device, where a whole trajectory is enqueued at once: looking at its
    calls one by one has the host wait for each."""

    def load(self, graph: str) -> Any:
        """Load one graph of the manifest; may be called by several threads at once."""

    def session(self, graphs: Any, batch: int) -> AnySession:
        """The buffers of one trajectory.

        Args:
            graphs: The runner, which has the graphs that were loaded.
            batch: Latents of the trajectory.
        """


@runtime_checkable
class Reschedulable(Backend, Protocol):
    """A backend whose engines may serve any schedule."""

    def with_schedule(self, reuse: Any) -> Backend:
        """The same engines and weights for another schedule."""


BACKENDS = {
    "ort": "l2c_export.runtime.ort:OrtBackend",
    "ort-cuda": "l2c_export.runtime.device.backend:ort_cuda",
    "rtx": "l2c_export.runtime.device.backend:rtx",
    "trt": "l2c_export.runtime.device.backend:trt",
    "lookalike": "l2c_export.runtime.device.backend:lookalike",
}
"""Name to ``"module:maker"``. A maker takes a bundle, a number of threads or None, and its options."""


def load_backend(
    name: str, bundle: Bundle, threads: int | None = None, options: Mapping[str, Any] | None = None
) -> Backend:
    """Make a backend by name.

    Raises:
        L2CError: There is no such backend or option, or it cannot serve this bundle.
        UnsupportedError: It is not installed, or this machine lacks the device.
    """
    if name not in BACKENDS:
        raise L2CError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if threads is not None and not (isinstance(threads, int | np.integer) and threads >= 1):
        raise L2CError(f"threads is {threads!r}; it must be a whole number, 1 or more")
    module, _, maker = BACKENDS[name].partition(":")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    try:
        make = getattr(importlib.import_module(module), maker)
        known = list(inspect.signature(make).parameters)[2:]
        if unknown := sorted(given.keys() - set(known)):
            has = ", ".join(known) or "none"
            raise L2CError(f"backend {name!r} has no option {unknown[0]!r}; its options: {has}")
        backend: Backend = make(bundle, threads, **given)
    except ImportError as error:
        raise UnsupportedError(
            f"backend {name!r} cannot import {error.name or error}; "
            f"install it with: pip install 'l2c-export[{name}]'"
        ) from None
    return backend
