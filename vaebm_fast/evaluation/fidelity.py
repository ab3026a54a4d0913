"""Frechet distance between two sets of features (FID's formula, arXiv:1706.08500), whatever made the features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.floating]


def frechet_distance(first: Features, second: Features) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features [N, D]; unit: the features' squared.

    In float64. The trace of the square root is taken from the symmetric S1^(1/2) S2 S1^(1/2), whose eigenvalues are
    real and not negative.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"Features must be [N, D] with one D; got {first.shape} and {second.shape}.")
    if min(len(first), len(second)) < 2:
        raise ValueError("A covariance needs at least two samples on each side.")
    (mean1, cov1), (mean2, cov2) = (_moments(features) for features in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root1 @ cov2 @ root1).clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def _moments(features: Features) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    exact = features.astype(np.float64)
    return exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False))
