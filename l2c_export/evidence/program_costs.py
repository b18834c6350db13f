"""What a bundle's program costs, from its manifest alone: the ceiling of a benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l2c_export.core.bundle import Manifest
from l2c_export.core.models import config_from_json
from l2c_export.runtime.session import dtype_of


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
    rows = manifest.rows
    calls = tuple(rows * config.call_macs(call.reads) for call in manifest.calls)
    conditioning = len(calls) * rows * config.conditioning_macs()
    return ProgramCosts(calls, rows * config.call_macs(), conditioning)


def cache_bytes(manifest: Manifest, batch: int) -> int:
    """Of all cache buffers of a session."""
    row = math.prod(manifest.slots.shape) * dtype_of(manifest.slots.dtype).itemsize
    return manifest.buffers * batch * manifest.rows * row
