"""The Triton kernels without a GPU: run in the interpreter (interpreted_*.py), compiled for sm_80 and sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vaebm_fast import _extension
from vaebm_fast.ops import _backend

REPOSITORY = Path(__file__).resolve().parent.parent
OPS = [op for op, backends in _backend.OP_BACKENDS.items() if "triton" in backends]

SHARED_LIMIT = 163 * 1024  # bytes that a block can have on sm_80; sm_90 has more
RARE_WINDOWS = ("7x7", "11x11")  # no published decoder has them, and they take minutes


@pytest.mark.parametrize("file", ["interpreted_triton.py", "interpreted_residual_tail.py"])
def test_kernels_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("residual_tail")])  # that is in Triton alone
def test_both_namespaces_have_the_same_schemas(op: str) -> None:
    if not _extension.is_available():
        pytest.skip(str(_extension.why_missing()))
    compiled, triton = (
        str(getattr(namespace, op).default._schema).partition("::")[2]
        for namespace in (torch.ops.vaebm_fast, torch.ops.vaebm_triton)
    )
    assert triton == compiled


def compile_and_check(matching: str, without: tuple[str, ...], cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Compile the kernels whose name contains `matching`: nothing spills, shared memory suffices."""
    pytest.importorskip("triton")
    from benchmarks import triton_aot

    patch.setenv("TRITON_CACHE_DIR", str(cache))
    rows = list(triton_aot.report(matching, without=without))
    assert {row.architecture for row in rows} == {80, 90}
    for row in rows:
        assert row.spills == 0, f"{row.name} spills {row.spills} bytes on sm_{row.architecture}."
        assert row.shared <= SHARED_LIMIT and 0 < row.registers <= 255


@pytest.fixture
def cache(pytestconfig: pytest.Config) -> Path:
    """Where compiled kernels are kept between runs; Triton looks them up by their source and constants."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("triton"))


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_backward")])
def test_kernels_compile_without_spills(op: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in float32, TF32 and bfloat16."""
    compile_and_check(op, RARE_WINDOWS, cache, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("window", RARE_WINDOWS)
def test_rare_windows_compile_without_spills(window: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_and_check(window, (), cache, monkeypatch)
