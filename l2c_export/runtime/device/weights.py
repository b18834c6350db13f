"""The weights on the device: one allocation, uploaded once, for all engines and sessions."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2c_export.core.bundle import Value
from l2c_export.errors import L2CError
from l2c_export.runtime.device.memory import Arena
from l2c_export.runtime.device.protocols import Device

_CHUNK = 16 << 20  # bytes of a pinned buffer
_BUFFERS = 2  # one is filled while the other is copied

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class _Stored(NamedTuple):
    """A tensor of the file: where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class DeviceWeights:
    """Addresses of the parameters that engines take as inputs.

    Attributes:
        size: Bytes of device memory.
    """

    def __init__(self, device: Device, path: Path, wanted: Iterable[Value]) -> None:
        """Upload parameters.

        Args:
            device: Where to.
            path: ``weights.safetensors``.
            wanted: The parameters, as engines want them; the same may come several times.

        Raises:
            L2CError: The file lacks one, or has it with other sizes.
        """
        stored = _header(path)
        chosen: dict[str, _Stored] = {}
        for value in wanted:
            chosen[value.name] = _checked(path, stored, value)
        sizes = {name: tensor.end - tensor.begin for name, tensor in chosen.items()}
        self._device = device
        self._arena = Arena(device, "the weights", sizes)
        self.size = self._arena.size
        try:
            _upload(device, path, self._arena, chosen)
        except BaseException:
            self._arena.close()
            raise

    def __contains__(self, name: object) -> bool:
        """Whether a parameter is there."""
        return name in self._arena.sizes

    def __getitem__(self, name: str) -> int:
        """Address of a parameter."""
        return self._arena[name]

    def __del__(self) -> None:
        """Give the memory back, when nobody runs engines on it any more."""
        if hasattr(self, "_arena"):
            with self._device.current():
                self._arena.close()


def _upload(device: Device, path: Path, arena: Arena, chosen: dict[str, _Stored]) -> None:
    """Copy from the mapped file through pinned buffers: pages are read while others are copied."""
    source = np.memmap(path, np.uint8, "r")
    with contextlib.ExitStack() as undo:
        buffers = []
        for _ in range(_BUFFERS):
            stream = device.create_stream()
            undo.callback(device.destroy_stream, stream)  # which waits for it
            buffers.append((stream, device.pinned(_CHUNK)))
        turns = itertools.cycle(buffers)
        for name, tensor in chosen.items():
            for begin in range(tensor.begin, tensor.end, _CHUNK):
                size = min(_CHUNK, tensor.end - begin)
                stream, buffer = next(turns)
                device.synchronize(stream)  # the copy that reads this buffer
                np.copyto(buffer[:size], source[begin : begin + size])
                device.upload(arena[name] + begin - tensor.begin, buffer[:size], stream)


def _header(path: Path) -> dict[str, _Stored]:
    """Tensors of a safetensors file: a length, a JSON header, then the data."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        return {
            name: _Stored(
                _NAMES.get(entry["dtype"], entry["dtype"]),
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise L2CError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise L2CError(f"{path} is damaged ({error!r}); copy or build the bundle again") from None


def _checked(path: Path, stored: dict[str, _Stored], value: Value) -> _Stored:
    tensor = stored.get(value.name)
    size = math.prod(int(dimension) for dimension in value.shape)
    if tensor is None or tensor.dtype != value.dtype or math.prod(tensor.shape) != size:
        has = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
        raise L2CError(
            f"an engine takes {value.name} as {value.dtype} {value.shape}, {path} has {has}; "
            "build the engines again"
        )
    return tensor
