"""What a backend is to the runner, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Bundle
from l2c_export.errors import L2CError, UnsupportedError

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

    def load(self, graph: str) -> LoadedGraph:
        """Load one graph of the manifest; may be called by several threads at once."""


BACKENDS = {"ort": "l2c_export.runtime.ort:OrtBackend"}
"""Name to ``"module:Class"``; the class takes a bundle and a number of threads or None."""


def load_backend(name: str, bundle: Bundle, threads: int | None = None) -> Backend:
    """Make a backend by name.

    Raises:
        L2CError: There is no such backend, or it cannot serve this bundle.
        UnsupportedError: It is not installed.
    """
    if name not in BACKENDS:
        raise L2CError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if threads is not None and not (isinstance(threads, int | np.integer) and threads >= 1):
        raise L2CError(f"threads is {threads!r}; it must be a whole number, 1 or more")
    module, _, cls = BACKENDS[name].partition(":")
    try:
        make = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise UnsupportedError(
            f"backend {name!r} cannot import {error.name or error}; "
            f"install it with: pip install 'l2c-export[{name}]'"
        ) from None
    backend: Backend = make(bundle, threads)
    return backend
