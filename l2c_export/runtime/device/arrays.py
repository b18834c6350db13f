"""Arrays in device memory that go in and out by DLPack, without a framework.

The structures are those of DLPack 0.8, ``DLManagedTensor`` in a capsule named ``dltensor``
(https://dmlc.github.io/dlpack/latest/c_api.html), which every framework takes and gives.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError
from l2c_export.runtime.device.protocols import Device

_CUDA = 2  # kDLCUDA
_CODES = {"i": 0, "u": 1, "f": 2}
_LEGACY_STREAM = 1  # what None means to a producer in CUDA memory


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


def _api(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _api("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_pointer = _api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_rename = _api("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
# of a capsule that is going away, which no Python reference may be made to
_is_valid = _api("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_raw_pointer = _api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)

_lent: dict[int, tuple[Any, ...]] = {}
"""What consumers hold: address of the structure to all that it refers to."""


def _forget(address: int) -> None:
    _lent.pop(address, None)


def _discard(capsule: int) -> None:
    if _is_valid(capsule, b"dltensor"):  # nobody took it
        _forget(_raw_pointer(capsule, b"dltensor"))


_give_back = _Deleter(_forget)
_destroy = _Destructor(_discard)


class DeviceArray:
    """A contiguous array in device memory of its own.

    Attributes:
        shape: Of the array.
        dtype: Of the array.
        address: Of its first value.
        stream: What fills it runs there; :meth:`numpy` and ``__dlpack__`` order themselves after it. A
            caller's own must last as long as the array.
    """

    def __init__(
        self, device: Device, shape: tuple[int, ...], dtype: Any, stream: int, owner: object = None
    ) -> None:
        """Allocate it.

        Args:
            device: Where.
            shape: Of the array.
            dtype: Of the array.
            stream: What will fill it runs there.
            owner: Keeps that stream; None where the caller does.
        """
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.filled_on(stream, owner)
        self._device = device
        self.address = device.allocate(self.nbytes, f"a result of shape {shape}")

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with self._device.current():
                self._device.free(self.address)

    def filled_on(self, stream: int, owner: object = None) -> None:
        """Take note of what fills it from now on: arguments as above."""
        self.stream, self._owner = stream, owner

    def checked(self, shape: tuple[int, ...], dtype: Any, what: str) -> int:
        """The address, if the array is of this shape and dtype.

        Raises:
            L2CError: It is not.
        """
        if (self.shape, self.dtype) != (shape, np.dtype(dtype)):
            has = f"{self.dtype} {self.shape}"
            raise L2CError(f"{what} is {has}; this bundle needs {np.dtype(dtype)} {shape}")
        return self.address

    def numpy(self) -> NDArray[Any]:
        """A copy in host memory."""
        array = np.empty(self.shape, self.dtype)
        with self._device.current():
            self._device.download(array, self.address, self.stream)
            self._device.synchronize(self.stream)
        return array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device.dlpack

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A capsule; the consumer's stream waits for what fills the array, the host does not."""
        with self._device.current():
            if self._device.dlpack[0] != _CUDA:
                self._device.synchronize(self.stream)
            elif stream != -1:
                self._device.follow(_LEGACY_STREAM if stream is None else stream, self.stream)
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        dtype = _DType(_CODES[self.dtype.kind], 8 * self.dtype.itemsize, 1)
        tensor = _Tensor(
            self.address, _Device(*self._device.dlpack), len(self.shape), dtype, shape, None, 0
        )
        managed = _Managed(tensor, None, ctypes.cast(_give_back, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _lent[address] = (self, managed, shape)
        return _new(address, b"dltensor", _destroy)


class Borrowed:
    """Another library's array in device memory, held until this is closed.

    Attributes:
        address: Of the first value.
    """

    def __init__(self, value: Any, stream: int, shape: tuple[int, ...], dtype: Any, what: str) -> None:
        """Take a contiguous array of exactly this shape and dtype.

        What its owner has enqueued on it comes before what we enqueue on the stream.

        Raises:
            L2CError: It is something else.
        """
        capsule = value.__dlpack__(stream=stream)
        managed = _Managed.from_address(_pointer(capsule, b"dltensor"))
        tensor = managed.tensor
        has = tuple(tensor.shape[i] for i in range(tensor.ndim))
        wanted = np.dtype(dtype)
        kind = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
        if has != shape:
            raise L2CError(f"{what} has shape {has}; this bundle needs {shape}")
        if kind != (_CODES[wanted.kind], 8 * wanted.itemsize, 1):
            raise L2CError(f"{what} is not {wanted}: cast it first")
        if bool(tensor.strides) and not _contiguous(has, [tensor.strides[i] for i in range(len(has))]):
            raise L2CError(f"{what} is not contiguous; make it so first")
        self.address = int(tensor.data) + int(tensor.byte_offset)
        self._managed: _Managed | None = managed
        _rename(capsule, b"used_dltensor")

    def close(self) -> None:
        """Give the array back; work on it must be ordered before what its owner does next."""
        managed, self._managed = self._managed, None
        if managed is not None and managed.deleter:
            _Deleter(managed.deleter)(ctypes.addressof(managed))


def on_device(value: Any, device: Device) -> bool:
    """Whether a value is an array in this device's memory.

    Raises:
        L2CError: It is in the memory of another GPU.
    """
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    kind, index = (int(part) for part in value.__dlpack_device__())
    if kind == _CUDA and (kind, index) != device.dlpack:
        raise L2CError(f"an array is in the memory of GPU {index}, the runner is on {device.name}")
    return kind == _CUDA or (isinstance(value, DeviceArray) and (kind, index) == device.dlpack)


def _contiguous(shape: tuple[int, ...], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
