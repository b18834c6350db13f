"""Training data: labelled images or latents, from an ``.npz`` or a folder with a sub-folder a class."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2c_export.core.files import sha256
from l2c_export.core.models import ModelConfig
from l2c_export.errors import L2CError

_PICTURES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB"}


class Dataset(Protocol):
    """Labelled latents, ready for the model."""

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256; a resumed training must have the same."""

    def __len__(self) -> int:
        """Rows."""

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(R, C, S, S) float32 latents and (R,) int64 labels."""


def read_dataset(path: Path, config: ModelConfig, latent_scale: float = 1.0) -> Dataset:
    """Open training data and check what can be checked without reading all of it.

    Args:
        path: An ``.npz`` with ``labels`` (M,) and ``latents`` or ``images`` (M, C, S, S); or a folder
            with one sub-folder a class, of ``.npy`` latents (C, S, S) or of PNG and JPEG images. If
            every sub-folder's name is a number, that is the label, else their order is.
        config: The model, which fixes C, S and the number of classes.
        latent_scale: Factor of latents (0.18215 for raw latents of Stable Diffusion's VAE). Images
            are not scaled by it: 0 … 255 becomes -1 … 1, and floats must be in -1 … 1 already.

    Raises:
        L2CError: The data are missing, damaged, or not for this model.
    """
    if path.is_dir():
        return _open_folder(path, config, latent_scale)
    if path.suffix != ".npz":
        raise L2CError(f"no training data at {path}; give an .npz file or a folder of class folders")
    return _open_npz(path, config, latent_scale)


# One file ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """Data in memory, as stored."""

    values: NDArray[Any]  # (M, C, S, S)
    labels: NDArray[np.int64]  # (M,)
    latents: bool
    scale: float
    digest: str
    where: str

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        values = self.values[rows]
        x = _latents(values, self.scale) if self.latents else _pixels(values, self.where)
        return torch.from_numpy(_finite(x, self.where)), torch.from_numpy(self.labels[rows])


def _open_npz(path: Path, config: ModelConfig, scale: float) -> _Arrays:
    try:
        with path.open("rb") as file:  # NumPy would leave a damaged file open
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("it is one array")
            arrays = {name: stored[name] for name in ("latents", "images", "labels") if name in stored}
    except OSError as error:
        raise L2CError(f"cannot read training data {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise L2CError(f"training data {path} is no .npz of plain arrays: {error}") from None
    if "labels" not in arrays or len(arrays) != 2:
        raise L2CError(
            f"{path} must hold 'labels' and one of 'latents' and 'images', it has {[*arrays]}"
        )
    labels = _check_labels(arrays.pop("labels"), config, path)
    [(kind, values)] = arrays.items()
    if values.shape != (len(labels), *config.latent_shape) or values.dtype.kind not in "fu":
        raise L2CError(
            f"{path}: '{kind}' is {values.shape} {values.dtype}, the labels and the model ask for "
            f"{(len(labels), *config.latent_shape)} of float or uint8"
        )
    return _Arrays(values, labels, kind == "latents", scale, sha256(path), str(path))


def _check_labels(labels: NDArray[Any], config: ModelConfig, path: Path) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise L2CError(f"{path}: 'labels' is {labels.shape} {labels.dtype}, it must be (M,) integers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= config.num_classes:
        raise L2CError(f"{path}: labels are {low} … {high}, the model has 0 … {config.num_classes - 1}")
    return labels.astype(np.int64)


# A folder ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """Data on disk, read when they are asked for."""

    files: Sequence[Path]
    labels: NDArray[np.int64]  # (M,)
    config: ModelConfig
    scale: float
    digest: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        values = np.stack([self._one(self.files[row]) for row in rows])
        return torch.from_numpy(values), torch.from_numpy(self.labels[rows])

    def _one(self, path: Path) -> NDArray[np.float32]:
        picture = path.suffix.lower() in _PICTURES
        values = _picture(path, self.config) if picture else _array(path)
        if values.shape != self.config.latent_shape:
            raise L2CError(f"{path} is {values.shape}, the model takes {self.config.latent_shape}")
        x = _pixels(values, str(path)) if picture else _latents(values, self.scale)
        return _finite(x, str(path))


def _open_folder(path: Path, config: ModelConfig, scale: float) -> _Folder:
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if classes and all(entry.name.isdecimal() for entry in classes):
        numbers = [int(entry.name) for entry in classes]
    else:
        numbers = list(range(len(classes)))
    files: list[Path] = []
    labels: list[int] = []
    for number, folder in zip(numbers, classes, strict=True):
        found = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".npy", *_PICTURES))
        files += found
        labels += [number] * len(found)
    if not files:
        raise L2CError(f"{path} has no class folders with .npy, .png or .jpg files in them")
    names = "".join(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n" for file in files)
    digest = hashlib.sha256(names.encode()).hexdigest()
    data = _Folder(files, _check_labels(np.array(labels), config, path), config, scale, digest)
    data.read([0])  # the commonest mistake, data of another model, is said before training starts
    return data


def _picture(path: Path, config: ModelConfig) -> NDArray[np.uint8]:
    """(C, H, W) of an image file."""
    from PIL import Image, UnidentifiedImageError

    if config.in_channels not in _MODES:
        raise L2CError(f"{path} is an image, the model takes latents of {config.in_channels} channels")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(_MODES[config.in_channels]))
    except (UnidentifiedImageError, OSError) as error:
        raise L2CError(f"cannot read image {path}: {error}") from None
    return pixels.reshape(*pixels.shape[:2], config.in_channels).transpose(2, 0, 1)


def _array(path: Path) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise L2CError(f"cannot read latent {path}: {error}") from None
    return values


# Values -----------------------------------------------------------------------------------------


def _latents(values: NDArray[Any], scale: float) -> NDArray[np.float32]:
    return values.astype(np.float32) * np.float32(scale)


def _pixels(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    """Images in -1 … 1."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if np.abs(values).max() > 1.001:
        raise L2CError(f"{where}: images of floats must be in -1 … 1, found {np.abs(values).max():g}")
    return values.astype(np.float32)


def _finite(values: NDArray[np.float32], where: str) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise L2CError(f"{where} holds NaN or Inf")
    return values
