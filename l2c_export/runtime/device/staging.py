"""How inputs get from the host to a session: through page-locked memory, on a stream of their own.

A copy from any other memory may wait for all that is on its stream
(https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.runtime.device.memory import Arena, padded
from l2c_export.runtime.device.protocols import Device


class Stream:
    """A stream that is there as long as somebody refers to it.

    Attributes:
        handle: Of the stream.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = device.create_stream()

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            with self._device.current():
                self._device.destroy_stream(self.handle)


class Staging:
    """Page-locked memory for one set of inputs."""

    def __init__(self, device: Device, arena: Arena, names: Iterable[str]) -> None:
        """Make room for inputs.

        Args:
            device: Where they go.
            arena: Has their buffers.
            names: Of the buffers.
        """
        self._device, self._arena = device, arena
        self._stream = Stream(device)
        sizes = {name: padded(arena.sizes[name]) for name in names}
        memory = device.pinned(sum(sizes.values()))
        self._parts, at = {}, 0
        for name, size in sizes.items():
            self._parts[name] = memory[at : at + size]
            at += size

    def send(self, arrays: Mapping[str, NDArray[Any]], stream: int) -> None:
        """Fill buffers after what is on a stream now, and before what comes next there.

        The host waits until what was sent last time has been copied, no longer.

        Args:
            arrays: Buffer to what it is filled with.
            stream: Where the buffers are used.
        """
        ours = self._stream.handle
        self._device.synchronize(ours)
        self._device.follow(ours, stream)
        for name, array in arrays.items():
            part = self._parts[name][: array.nbytes]
            np.copyto(part, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            self._device.upload(self._arena[name], part, ours)
        self._device.follow(stream, ours)
