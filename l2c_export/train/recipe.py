"""How a router is trained; no torch, so that the command line can check it at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from l2c_export.errors import L2CError

LATENT_SCALE = 0.18215
"""What the official models multiply the latents of Stable Diffusion's VAE with."""


@dataclass(frozen=True)
class Recipe:
    """How a router is trained; the defaults are those of L2C for DiT with 20 calls.

    Attributes:
        steps: Calls of a trajectory; even.
        iterations: Optimizer steps.
        batch: Latents an iteration, over all processes.
        lr: Constant learning rate of AdamW (no weight decay).
        l1: Weight of the sum of scores, which pushes towards reuse.
        ste_threshold: If given, branches are computed or reused outright, where the score is above it
            or not, and gradients pass straight through; None mixes softly.
        label_dropout: Probability of the null label.
        clamp: Logits stay in -clamp … clamp.
        seed: Of the initial logits, the order of the data, the noise and the dropped labels.
    """

    steps: int = 20
    iterations: int = 20000
    batch: int = 64
    lr: float = 1e-3
    l1: float = 5e-6
    ste_threshold: float | None = None
    label_dropout: float = 0.1
    clamp: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.steps < 2 or self.steps % 2:
            raise L2CError(
                f"--steps {self.steps}: a DiT router pairs the calls of a trajectory, so their number "
                f"must be even; use {max(2, self.steps + self.steps % 2)}"
            )
        limits = {
            "iterations": (1, 10**9),
            "batch": (1, 10**6),
            "lr": (0, 10),
            "l1": (0, 1e6),
            "ste_threshold": (0, 1),
            "label_dropout": (0, 1),
            "clamp": (1e-3, 80),
            "seed": (0, 2**63 - 1),
        }
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), limits.get(field.name, (0, 1000))
            if value is not None and not low <= value <= high:
                name = field.name.replace("_", "-")
                raise L2CError(f"--{name} {value} is outside {low} … {high}")
