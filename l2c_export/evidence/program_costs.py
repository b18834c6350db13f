"""What a bundle's program costs, from its manifest alone: the ceiling of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2c_export.core.bundle import Manifest
from l2c_export.core.models import config_from_json


@dataclass(frozen=True)
class ProgramCosts:
    """Multiply-accumulates of one latent, guidance rows included.

    Attributes:
        calls: Of each call, without the conditioning.
        full: Of a call that computes everything, without the conditioning.
        conditioning: Of all calls together.
    """

    calls: tuple[int, ...]
    full: int
    conditioning: int

    @property
    def ideal(self) -> float:
        """Uncached over cached, the conditioning on both sides."""
        uncached = len(self.calls) * self.full + self.conditioning
        return uncached / (sum(self.calls) + self.conditioning)


def program_costs(manifest: Manifest) -> ProgramCosts:
    """What the manifest's program costs."""
    config = config_from_json(manifest.model, "model")
    slots, rows = config.slot_macs(), manifest.rows
    full = rows * (sum(slots.values()) + config.fixed_macs())
    calls = tuple(full - rows * sum(slots[name] for name in call.reads) for call in manifest.calls)
    return ProgramCosts(calls, full, len(calls) * rows * config.conditioning_macs())


def cache_bytes(manifest: Manifest, batch: int) -> int:
    """Of all cache buffers of a session."""
    value = np.dtype(manifest.slots.dtype).itemsize
    return manifest.buffers * batch * manifest.rows * int(np.prod(manifest.slots.shape)) * value
