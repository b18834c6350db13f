"""Read files that strangers made: PyTorch pickles without running their code.

A pickle is a program. ``weights_only`` runs it on an interpreter that knows tensors and plain
containers; the released files need one more class, ``argparse.Namespace``, and get exactly that.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

from l2c_export.errors import L2CError, UnsupportedError

_MAGIC = (b"PK\x03\x04", b"\x80")  # a zip archive, or the bare pickle of old releases


def check_file(path: Path, what: str) -> int:
    """Bytes of a file that exists and is not empty.

    Raises:
        L2CError: It does not exist, is a folder, or is empty.
    """
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise L2CError(f"{what} {path} {state}")
    if not (size := path.stat().st_size):
        raise L2CError(f"{what} {path} is empty; copy or download it again")
    return size


def load_pickle(path: Path, data: bytes | None = None) -> Any:
    """Unpickle a PyTorch file onto the CPU without running code from it.

    Args:
        path: The file; its tensors are mapped into memory where the format allows it.
        data: The file's content, if it is in memory already.

    Raises:
        L2CError: The file asks for code, or it is damaged.
        UnsupportedError: PyTorch is missing.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise UnsupportedError(
            f"reading {path} needs PyTorch; install it with: pip install 'l2c-export[build]'"
        ) from None
    with path.open("rb") as file:
        head = data[:4] if data is not None else file.read(4)
    if not head.startswith(_MAGIC):
        raise L2CError(f"{path} is neither a PyTorch file nor safetensors; copy or download it again")
    # Old files are one pickle, which cannot be mapped.
    mmap = data is None and head.startswith(b"PK")
    source = str(path) if data is None else io.BytesIO(data)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise L2CError(
                f"{path} wants to run code ({code[1]}) when it is loaded and is refused; "
                "save plain tensors, or use safetensors"
            ) from None
        raise L2CError(f"{path} is damaged or holds more than plain tensors: {_line(error)}") from None
    except Exception as error:  # a broken pickle can make its interpreter raise anything
        raise L2CError(f"{path} is damaged: {_line(error)}; copy or download it again") from None


def _line(error: Exception) -> str:
    """The part of a long message that says what is wrong, on one line."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error) or type(error).__name__
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:160].rstrip(" .")
