"""Where the golden cases are, and how they are read: `tests/golden/<case>` first, then `../shared/golden/<case>`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = (REPOSITORY / "tests" / "golden", REPOSITORY.parent / "shared" / "golden")
CASES = ("cifar_tiny", "alt_tiny", "mnist_tiny", "dml_tiny", "celeba64_tiny", "hq_tiny")
ENERGY_CASES = ("cifar_tiny", "alt_tiny", "celeba64_tiny", "hq_tiny")


def case_path(case: str, file: str) -> Path:
    """Path of a case's file; skips the test where the case is not at hand."""
    for root in ROOTS:
        if (root / case / file).exists():
            return root / case / file
    pytest.skip(f"golden case {case} is neither in tests/golden nor beside the repository")


def load_expected(case: str) -> dict[str, Any]:
    """The measured numbers of a case."""
    return torch.load(case_path(case, "expected.pt"), weights_only=True)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in norm, in float64."""
    difference = (actual.detach().double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
