"""The Triton kernels without a GPU: run in the interpreter (interpreted_*.py), compiled for sm_80 and sm_90."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from vaebm_fast import _extension
from vaebm_fast.ops import _backend

if TYPE_CHECKING:
    from benchmarks.triton_aot import Compiled

REPOSITORY = Path(__file__).resolve().parent.parent
OPS = [op for op, backends in _backend.OP_BACKENDS.items() if "triton" in backends]

SHARED_LIMIT = 163 * 1024  # bytes that a block can have on sm_80; sm_90 has more
RARE_WINDOWS = ("7x7", "11x11")  # no published decoder has them, and they take minutes


# The claims about noise and update, on backend "triton"; without sizes that are another backend's edges, and without
# the chain to a stationary law, which would take a minute.
CLAIMS = "triton and not (stationary or 20000 or 63 or 64 or 65 or 66)"
INTERPRETED = {
    "kernels": ("tests/interpreted_triton.py",),
    "residual_tail": ("tests/interpreted_residual_tail.py",),
    "TF32": ("tests/interpreted_tf32.py",),
    "noise": ("tests/interpreted_noise.py",),
    "claims about noise": ("tests/test_noise.py", "tests/test_langevin_update.py", "-k", CLAIMS),
}


@pytest.mark.parametrize("tests", INTERPRETED)
def test_kernels_in_the_interpreter(tests: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED[tests]],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


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
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:  # a process per architecture
        compiled = pool.map(partial(_compile, matching, without), triton_aot.ARCHITECTURES)
        rows = [row for found in compiled for row in found]
    assert {row.architecture for row in rows} == {80, 90}
    for row in rows:
        assert row.spills == 0, f"{row.name} spills {row.spills} bytes on sm_{row.architecture}."
        assert row.shared <= SHARED_LIMIT and 0 < row.registers <= 255


def _compile(matching: str, without: tuple[str, ...], architecture: int) -> list[Compiled]:
    from benchmarks import triton_aot

    return list(triton_aot.report(matching, without, (architecture,)))


@pytest.fixture
def cache(pytestconfig: pytest.Config) -> Path:
    """Where compiled kernels are kept between runs; Triton looks them up by their source and constants."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("triton"))


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_backward")])
def test_kernels_compile_without_spills(op: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in float32, TF32 and bfloat16."""
    compile_and_check(op, RARE_WINDOWS, cache, monkeypatch)


def test_batches_of_any_size_run_the_same_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of pixels, so that the number of images alone decides whether theirs is a multiple of 16."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from benchmarks import triton_aot
    from vaebm_fast.triton_kernels import depthwise_swish, energy_epilogue, pointwise, residual_tail

    monkeypatch.setattr(pointwise, "shape_class", lambda *sizes: "small")  # which follows the number of images
    new, hashes = partial(triton_aot._empty, torch.float32), []
    weights = new(5, 5, 32), new(32), new(48, 32), new(48), new(4, 48), new(4), new(48, 4), new(48)
    for N in (1, 2, 16):
        h, y = new(N, 32, 9, 9), new(N, 48, 9, 9)
        with triton_aot.recorded_launches() as launches:
            depthwise_swish.depthwise_swish(h, *weights[:2], True)
            pointwise.pointwise(h, weights[2], weights[2].T, weights[3], y, True)
            pointwise.pointwise_backward(y, weights[2].T, 32, h)
            residual_tail.residual_tail(h, y, *weights, False)
            residual_tail.residual_tail_backward(y, h, h, y, new(N, 4), new(N, 48), *weights[::2], False)
            energy_epilogue.energy_epilogue(y, y, 1.0)
        sources = [triton_aot.specialised(launch, GPUTarget("cuda", 90, 32))[0] for launch in launches]
        hashes.append([source.hash() for source in sources])
    assert len(hashes[0]) == 12 and hashes[0] == hashes[1] == hashes[2]


# Products, sums and roots of a Box-Muller pair in csrc/math.h, two pairs for each thread's two counters.
PRODUCTS, SUMS, COUNTERS_PER_THREAD = 26, 20, 2


@pytest.mark.parametrize(
    ("case", "products", "sums"),
    # and per element of the update half * slope, root * noise, two sums, and one with the prior
    [("philox_normal", 0, 0), ("langevin_update", 2, 2), ("langevin_update, prior", 2, 3)],
)
def test_noise_compiles_to_the_ieee_operations_of_the_recipe(
    case: str, products: int, sums: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PTX a rounding mode (.rn) forbids ptxas to contract; no fma, nothing approximate, nothing flushed to zero."""
    pytest.importorskip("triton")
    from benchmarks import triton_aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    for row in triton_aot.report(case):
        if row.name != case:
            continue
        done = Counter(re.findall(r"^\s+(?:@\S+\s+)?(\w[\w.]*\.f32\b[\w.]*)", row.ptx, re.MULTILINE))
        pairs, elements = 2 * COUNTERS_PER_THREAD, 4 * COUNTERS_PER_THREAD
        assert done.pop("mul.rn.f32") == PRODUCTS * pairs + products * elements
        assert done.pop("add.rn.f32") + done.pop("sub.rn.f32") == SUMS * pairs + sums * elements
        # float of a word, of the rest of its quarter turn and of the exponent; swapped and negated by bits
        assert done == {
            "sqrt.rn.f32": pairs,
            "cvt.rn.f32.u32": pairs,
            "cvt.rn.f32.s32": 2 * pairs,
            "selp.f32": 2 * pairs,
        }


def test_tensor_cores_get_rounded_tf32_operands(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In PTX every register that they multiply is masked; on sm_90 both operands' elements are, once each.

    There the weight reaches them through shared memory; on sm_80 warps that share an operand round it once each.
    """
    pytest.importorskip("triton")
    from benchmarks import triton_aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    seen = 0
    for name, call in triton_aot.cases():
        with triton_aot.recorded_launches() as launches:
            call()
        for launch in launches:
            if launch.kwargs.get("PRECISION") != "tf32":
                continue
            seen += 1
            sm_80, sm_90 = (triton_aot.compile_launch(name, launch, each).ptx for each in triton_aot.ARCHITECTURES)
            operands = re.findall(r"mma\.sync\S*tf32\S* \{[^}]*\}, \{([^}]*)\}, \{([^}]*)\}", sm_80)
            multiplied = {register for pair in operands for text in pair for register in text.split(", ")}
            assert multiplied and {register.strip() for register in multiplied} == rounded_registers(sm_80)
            M, N, K, warps = (launch.kwargs[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
            assert "wgmma" in sm_90 and len(rounded_registers(sm_90)) == (M + N) * K // (32 * warps)
    assert seen == 8


def rounded_registers(ptx: str) -> set[str]:
    """Those that `activation.round_to_tf32` leaves its results in."""
    masked = set(re.findall(r"and\.b32\s+(%r\d+), %r\d+, -8192;", ptx))
    sums = re.findall(r"fma\.rn\.f32\s+(%r\d+), %r\d+, 0f0D800000, (%r\d+);", ptx)
    return {register for register, addend in sums if addend in masked}


@pytest.mark.slow
@pytest.mark.parametrize("window", RARE_WINDOWS)
def test_rare_windows_compile_without_spills(window: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_and_check(window, (), cache, monkeypatch)
