"""Fréchet distance between two sets of features, each taken as a Gaussian.

With the features of an Inception network this is the FID (Heusel et al. 2017, arXiv 1706.08500).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2c_export.errors import L2CError


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[Any]) -> Gaussian:
        """Fit to (N, D) features.

        Raises:
            L2CError: There are fewer than two rows, or they are not finite.
        """
        if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
            raise L2CError(f"a Gaussian needs two or more rows of finite features: {features.shape}")
        values = features.astype(np.float64)
        return cls(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` (Dowson & Landau 1982).

    The trace of the root is the sum of the roots of the eigenvalues of ``A^(1/2) B A^(1/2)``, which is
    symmetric: no complex matrix root is needed, and singular covariances are no trouble.

    Raises:
        L2CError: The two have another number of features.
    """
    if a.mean.shape != b.mean.shape:
        raise L2CError(f"{len(a.mean)} features cannot be compared with {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    overlap = np.sqrt(product.clip(min=0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap)
