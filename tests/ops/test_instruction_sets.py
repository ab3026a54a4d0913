"""The kernels that a machine with narrower vectors would run pass the same tests."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ahead import Ran

TESTS = Path(__file__).parent
OPS = (
    "depthwise_swish",
    "power_iteration",
    "pointwise",
    "energy_epilogue",
    "energy_head",
    "se_gate_residual",
    "gaussian_latent",
    "pixel_head",
)
FILES = [str(TESTS / f"test_{op}.py") for op in OPS]


def narrowed_to(capability: str) -> Any:
    """A case: the tests of the kernels, where torch and the compiled part see no more than this."""
    program = (
        "import sys, pytest, torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r}\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{FILES!r}, '-k', 'test_kernel']))"
    )
    return pytest.param(marks=pytest.mark.ahead("-c", program, ATEN_CPU_CAPABILITY=capability), id=capability)


@pytest.mark.parametrize((), [narrowed_to("avx2"), narrowed_to("default")])
def test_narrower_instruction_sets_pass_the_tests_of_the_kernels(compiled: None, ahead: Ran) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has several")
    assert ahead.returncode == 0, ahead.output
    assert "passed" in ahead.output and "skipped" not in ahead.output
