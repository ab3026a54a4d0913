"""Frechet distance between two sets of arbitrary features (formula of FID, arXiv:1706.08500)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.floating]


def frechet_distance(first: Features, second: Features) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features [N, D], in squared feature units.

    Computed in float64. The trace of the square root uses the symmetric S1^(1/2) S2 S1^(1/2), whose eigenvalues are
    real and non-negative.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"Features must be [N, D] with equal D; got {first.shape} and {second.shape}.")
    if min(len(first), len(second)) < 2:
        raise ValueError("Each set of features needs at least two samples to compute a covariance.")
    (mean1, cov1), (mean2, cov2) = (_moments(features) for features in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root1 @ cov2 @ root1).clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def _moments(features: Features) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    exact = features.astype(np.float64)
    return exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False))
