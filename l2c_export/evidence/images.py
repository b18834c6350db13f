"""Pictures of samples: a grid of images as a PNG."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.files import replacing
from l2c_export.errors import UnsupportedError

IMAGE_CHANNELS = (1, 3)
"""Channels of a model that makes images; others make latents, which need a decoder (VAE)."""

_GAP = 2  # pixels between images


def image_grid(images: NDArray[Any], columns: int | None = None, side: int = 96) -> NDArray[np.uint8]:
    """Lay images out in a grid on white.

    Args:
        images: (N, C, H, W) with C of 1 or 3; -1 is black, 1 is white.
        columns: Images in a row; None makes the grid about square.
        side: Images smaller than this many pixels are enlarged by a whole factor.

    Returns:
        (height, width, 3) pixels.
    """
    count, channels, height, width = images.shape
    if channels not in IMAGE_CHANNELS:
        raise ValueError(f"{channels} channels are not an image")
    factor = max(1, round(side / max(height, width)))
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    levels = np.nan_to_num(np.clip(images.astype(np.float64), -1, 1), nan=-1)
    pixels = np.rint((levels + 1) * 127.5).astype(np.uint8)
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3).transpose(0, 2, 3, 1)
    high, wide = height * factor + _GAP, width * factor + _GAP
    grid = np.full((math.ceil(count / columns) * high - _GAP, columns * wide - _GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * high, i % columns * wide
        grid[top : top + high - _GAP, left : left + wide - _GAP] = image
    return grid


def write_grid(path: Path, images: NDArray[Any], columns: int | None = None, side: int = 96) -> None:
    """Write a grid of images to a PNG file; arguments as in :func:`image_grid`.

    Raises:
        UnsupportedError: Pillow is not installed.
    """
    check_pillow()
    from PIL import Image

    picture = Image.fromarray(image_grid(images, columns, side))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def check_pillow() -> None:
    """Refuse, before any work is done, to draw without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise UnsupportedError("a PNG needs Pillow; install it with: pip install 'l2c-export[report]'")
