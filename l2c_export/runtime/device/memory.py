"""Device memory in one allocation, cut into named and aligned buffers."""

from __future__ import annotations

from collections.abc import Mapping

from l2c_export.errors import UnsupportedError
from l2c_export.runtime.device.protocols import ALIGNMENT, Device

ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of a value by the name of its dtype in manifests."""


def item_bytes(dtype: str) -> int:
    """Bytes of one value.

    Raises:
        UnsupportedError: The dtype is not known.
    """
    if dtype not in ITEM_BYTES:
        raise UnsupportedError(
            f"the device runner does not know {dtype}; known: {', '.join(ITEM_BYTES)}"
        )
    return ITEM_BYTES[dtype]


def padded(size: int) -> int:
    """The next size that keeps what comes after it aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Arena:
    """One allocation for many buffers; given back as a whole.

    Attributes:
        size: Bytes of all of it.
        sizes: Name to bytes of a buffer.
    """

    def __init__(self, device: Device, purpose: str, sizes: Mapping[str, int]) -> None:
        self._device = device
        self.sizes = dict(sizes)
        self._offsets: dict[str, int] = {}
        at = 0
        for name, size in sizes.items():
            self._offsets[name] = at
            at += padded(size)
        self.size = at
        self._address: int | None = device.allocate(at, purpose)

    def __getitem__(self, name: str) -> int:
        """Address of a buffer."""
        if self._address is None:
            raise AssertionError(f"buffer {name} was given back")
        return self._address + self._offsets[name]

    def close(self) -> None:
        """Give the memory back; once more does nothing."""
        address, self._address = self._address, None
        if address is not None:
            self._device.free(address)
