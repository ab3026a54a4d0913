"""The kernels that a machine with narrower vectors would run pass the same tests."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_instruction_sets_pass_the_tests_of_the_kernels(capability: str, compiled: None) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has several")
    program = (
        "import sys, pytest, torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r}\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{FILES!r}, '-k', 'test_kernel']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TESTS.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
