"""Sampling to files: what ``l2c-export run`` does."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.core.bundle import Manifest
from l2c_export.core.files import read_array, replacing
from l2c_export.errors import L2CError, UnsupportedError
from l2c_export.evidence.images import IMAGE_CHANNELS, check_pillow, write_grid
from l2c_export.evidence.schedule_file import load_runner
from l2c_export.runtime.inputs import check_guidance, check_noise

_SUFFIXES = (".npz", ".npy", ".png")
_DEFAULT_IMAGES = 10


@dataclass(frozen=True)
class SampleOptions:
    """What to sample.

    Attributes:
        labels: One an image; None for some classes.
        seed: For the noise; 0 if there is none, unless ``noise`` is all there is to draw.
        noise: A ``.npy`` file of (images, C, H, W) float32 to start from.
        guidance_scale: None for the bundle's own.
        cached: Whether to follow a schedule, or to compute everything.
        schedule: A ``.npy`` file of another schedule than the bundle's own; see
            :func:`l2c_export.evidence.schedule_file.load_runner`.
        backend: What runs the graphs.
        engines: Name of a folder of the bundle's engines; None for the best that fits.
        threads: For each call; None for the backend's choice.
    """

    labels: tuple[int, ...] | None = None
    seed: int | None = None
    noise: Path | None = None
    guidance_scale: float | None = None
    cached: bool = True
    schedule: Path | None = None
    backend: str = "ort"
    engines: str | None = None
    threads: int | None = None


Progress = Callable[[int, int], None]
"""Told the calls that are done and those there are."""


def sample_to_files(
    bundle: Path, options: SampleOptions, output: Path, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Load a bundle, sample, and write files.

    Args:
        bundle: The bundle's folder.
        options: What to sample.
        output: ``.npz`` (latents, labels, noise, facts), ``.npy`` (latents) or ``.png`` (a grid);
            with ``.npz``, a model that makes images gets its ``.png`` beside it if Pillow is there.
        progress: Told each call; on a device, which runs them all at once, the beginning and the end.

    Returns:
        What was done, ready for JSON; ``outputs`` are the files.

    Raises:
        L2CError: An option does not fit the bundle, or a file cannot be read or written.
    """
    _check_output(output)
    given = read_array(options.noise, "noise", "numbers") if options.noise else None
    began = time.perf_counter()
    runner = load_runner(bundle, options.backend, options.threads, options.engines, options.schedule)
    loaded = time.perf_counter() - began
    manifest = runner.manifest
    outputs = _outputs(manifest, output)
    labels = options.labels or default_labels(manifest, None if given is None else len(given))
    seed = options.seed or 0 if manifest.stochastic or not options.noise else None
    noise = check_noise(manifest, len(labels), given, seed)
    total, counted = _trajectories(manifest, len(labels)) * len(manifest.calls), itertools.count(1)
    progress(0, total)
    began = time.perf_counter()
    latents = runner.sample(
        labels,
        noise=noise,
        seed=seed if manifest.stochastic else None,
        guidance_scale=options.guidance_scale,
        cached=options.cached,
        callback=None if runner.backend.streams else lambda *_: progress(next(counted), total),
    )
    seconds = time.perf_counter() - began
    progress(total, total)
    if not np.isfinite(latents).all():
        raise L2CError(f"the result has NaN or infinite values; see: l2c-export verify {bundle}")
    trajectories = _trajectories(manifest, len(labels))
    facts = {
        "bundle": str(bundle),
        "backend": runner.backend.version,
        "random_weights": manifest.random_weights,
        "images": len(labels),
        "labels": list(labels),
        "seed": seed,
        "noise": str(options.noise) if options.noise else None,
        "guidance_scale": check_guidance(manifest, options.guidance_scale)
        if manifest.guidance
        else None,
        "cached": options.cached,
        "sampler": manifest.sampler,
        "calls": len(manifest.calls),
        "schedule": manifest.schedule,
        "trajectories": trajectories,
        "seconds_per_trajectory": round(seconds / trajectories, 4),
        "load_seconds": round(loaded, 4),
        "outputs": [str(path) for path in outputs],
    }
    for path in outputs:
        _write(path, latents, np.array(labels, np.int64), noise, facts)
    return facts


def default_labels(manifest: Manifest, count: int | None = None) -> tuple[int, ...]:
    """Classes spread over all there are: ``count`` of them, or one batch of at most ten."""
    low, high = manifest.batch
    count = max(low, min(high, manifest.classes, _DEFAULT_IMAGES)) if count is None else count
    return tuple(i * manifest.classes // count for i in range(count))


def _trajectories(manifest: Manifest, images: int) -> int:
    return math.ceil(images / manifest.batch[1])


def _check_output(path: Path) -> None:
    """Refuse an output that could not be written before hours are spent on it."""
    if path.suffix not in _SUFFIXES:
        raise L2CError(f"output {path}: give a name that ends in {', '.join(_SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.is_dir()
    except OSError as error:
        raise _unwritable(path, error) from None
    if folder or not os.access(path.parent, os.W_OK):
        raise L2CError(f"cannot write output {path}: it is a folder, or its folder is not writable")


def _unwritable(path: Path, error: OSError) -> L2CError:
    # Pillow's errors have no strerror
    return L2CError(f"cannot write output {path}: {error.strerror or error}")


def _outputs(manifest: Manifest, output: Path) -> list[Path]:
    """The files to write: a picture comes with the data where the model makes images."""
    makes_images = manifest.latent[0] in IMAGE_CHANNELS
    if output.suffix == ".png":
        if not makes_images:
            raise UnsupportedError(f"output {output}: {latent_note(manifest)}; write .npz or .npy")
        check_pillow()
        return [output]
    if output.suffix == ".npz" and makes_images and importlib.util.find_spec("PIL"):
        return [output, output.with_suffix(".png")]
    return [output]


def latent_note(manifest: Manifest) -> str:
    """Why there is no picture of a latent."""
    return f"latents of {manifest.latent[0]} channels need the model's VAE to become pictures"


def _write(
    path: Path,
    latents: NDArray[np.float32],
    labels: NDArray[np.int64],
    noise: NDArray[np.float32],
    facts: dict[str, Any],
) -> None:
    try:
        if path.suffix == ".png":
            return write_grid(path, latents)
        data = io.BytesIO()  # numpy itself tells of a full disk without the reason, or more than once
        if path.suffix == ".npy":
            np.save(data, latents)
        else:
            text = np.array(json.dumps(facts, ensure_ascii=False))
            np.savez(data, latents=latents, labels=labels, noise=noise, facts=text)
        with replacing(path) as temporary:
            temporary.write_bytes(data.getbuffer())
    except OSError as error:
        raise _unwritable(path, error) from None
