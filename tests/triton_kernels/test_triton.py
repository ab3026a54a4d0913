"""The Triton kernels without a GPU: run in the interpreter (interpreted_*.py), compiled for sm_80 and sm_90."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers.ahead import PYTEST, REPOSITORY, Ran
from vaebm_fast.ops import _backend
from vaebm_fast.runtime import extension

OPS = [op for op, backends in _backend.OP_BACKENDS.items() if "triton" in backends]

CACHE = REPOSITORY / ".pytest_cache" / "triton"  # kept between runs: Triton looks up kernels by source and constants
SHARED_LIMIT = 163 * 1024  # bytes that a block can have on sm_80; sm_90 has more
RARE_WINDOWS = ("7x7", "11x11")  # no published decoder has them, and they take minutes


# The claims about noise and update, on backend "triton"; without sizes that are another backend's edges, and without
# the chain to a stationary law, which would take a minute.
CLAIMS = "triton and not (stationary or 20000 or 63 or 64 or 65 or 66)"
INTERPRETED = {
    "kernels": ("tests/triton_kernels/interpreted_triton.py",),
    "residual_tail": ("tests/triton_kernels/interpreted_residual_tail.py",),
    "TF32": ("tests/triton_kernels/interpreted_tf32.py",),
    "noise": ("tests/triton_kernels/interpreted_noise.py",),
    "gather_images": (
        "tests/triton_kernels/interpreted_gather.py",
        "tests/ops/test_gather_images.py",
        "-k",
        "(interpreted or triton) and not graph",
    ),
    "claims about noise": ("tests/chain/test_noise.py", "tests/ops/test_langevin_update.py", "-k", CLAIMS),
}
IN_INTERPRETER = [
    pytest.param(marks=pytest.mark.ahead(*PYTEST, *tests, TRITON_INTERPRET="1"), id=name)
    for name, tests in INTERPRETED.items()
]


@pytest.mark.parametrize((), IN_INTERPRETER)
def test_kernels_in_the_interpreter(ahead: Ran) -> None:
    pytest.importorskip("triton")
    assert ahead.returncode == 0, ahead.output[-10_000:]
    assert "passed" in ahead.output and "skipped" not in ahead.output


@pytest.mark.parametrize("op", [op for op in OPS if "cpp" in _backend.OP_BACKENDS[op]])  # others are Triton's alone
def test_both_namespaces_have_the_same_schemas(op: str) -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_missing()))
    compiled, triton = (
        str(getattr(namespace, op).default._schema).partition("::")[2]
        for namespace in (torch.ops.vaebm_fast, torch.ops.vaebm_triton)
    )
    assert triton == compiled


@pytest.fixture
def compiled_ahead(ahead: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds what the run in the test's mark has compiled."""
    pytest.importorskip("triton")
    assert ahead.returncode == 0, ahead.output[-10_000:]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))


def compiling(matching: str, without: tuple[str, ...], *arguments: Any) -> Any:
    """A case of a test that begins with (matching, without) and needs these kernels compiled for both architectures."""
    options = [f"--without={part}" for part in without]
    command = ("-m", "benchmarks", "kernels", "--launches", matching, *options)
    mark = pytest.mark.ahead(*command, TRITON_CACHE_DIR=str(CACHE))
    return pytest.param(matching, without, *arguments, marks=mark, id=matching)


def assert_no_spills(matching: str, without: tuple[str, ...]) -> None:
    """Of kernels whose name contains `matching`; and their shared memory suffices."""
    from benchmarks.gpu import triton_aot

    rows = list(triton_aot.report(matching, without))
    assert {row.architecture for row in rows} == {80, 90}
    for row in rows:
        assert row.spills == 0, f"{row.name} spills {row.spills} bytes on sm_{row.architecture}."
        assert row.shared <= SHARED_LIMIT and 0 < row.registers <= 255


@pytest.mark.parametrize(("op", "without"), [compiling(op, RARE_WINDOWS) for op in OPS if not op.endswith("_backward")])
def test_kernels_compile_without_spills(op: str, without: tuple[str, ...], compiled_ahead: None) -> None:
    """Forward and backward, in float32, TF32 and bfloat16."""
    assert_no_spills(op, without)


def test_batches_of_any_size_run_the_same_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of pixels, so that the number of images alone decides whether theirs is a multiple of 16."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from benchmarks.gpu import triton_aot
    from benchmarks.gpu.launches import recorded_launches
    from vaebm_fast.triton_kernels import depthwise_swish, energy_epilogue, pointwise, residual_tail

    monkeypatch.setattr(pointwise, "shape_class", lambda *sizes: "small")  # which follows the number of images
    new, hashes = partial(triton_aot._empty, torch.float32), []
    weights = new(5, 5, 32), new(32), new(48, 32), new(48), new(4, 48), new(4), new(48, 4), new(48)
    for N in (1, 2, 16):
        h, y = new(N, 32, 9, 9), new(N, 48, 9, 9)
        with recorded_launches() as launches:
            depthwise_swish.depthwise_swish(h, *weights[:2], True)
            pointwise.pointwise(h, weights[2], weights[2].T, weights[3], y, "swish")
            pointwise.pointwise_backward(y, weights[2].T, 32, h, "swish")
            residual_tail.residual_tail(h, y, *weights, False)
            residual_tail.residual_tail_backward(y, h, h, y, new(N, 4), new(N, 48), *weights[::2], False)
            energy_epilogue.energy_epilogue(y, y, 1.0, weights[3])
        sources = [triton_aot.specialised(launch, GPUTarget("cuda", 90, 32))[0] for launch in launches]
        hashes.append([source.hash() for source in sources])
    assert len(hashes[0]) == 12 and hashes[0] == hashes[1] == hashes[2]


# Products, sums and roots of a Box-Muller pair in csrc/math.h, two pairs for each thread's two counters.
PRODUCTS, SUMS, COUNTERS_PER_THREAD = 26, 20, 2


@pytest.mark.parametrize(
    ("op", "without", "case", "products", "sums"),
    [
        # and per element of the update half * slope, root * noise, two sums, and one with the prior
        compiling("philox_normal", RARE_WINDOWS, "philox_normal", 0, 0),
        compiling("langevin_update", RARE_WINDOWS, "langevin_update", 2, 2),
        compiling("langevin_update", RARE_WINDOWS, "langevin_update, prior", 2, 3),
    ],
)
def test_noise_compiles_to_the_ieee_operations_of_the_recipe(
    op: str, without: tuple[str, ...], case: str, products: int, sums: int, compiled_ahead: None
) -> None:
    """In PTX a rounding mode (.rn) forbids ptxas to contract; no fma, nothing approximate, nothing flushed to zero."""
    from benchmarks.gpu import triton_aot

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


@pytest.mark.parametrize(("op", "without"), [compiling("gather_images", RARE_WINDOWS)])
def test_gathered_bytes_are_stored_as_words_where_rows_are_words(
    op: str, without: tuple[str, ...], compiled_ahead: None
) -> None:
    """Four bytes a thread: adjacent threads of a load are then four bytes apart, not sixteen."""
    from benchmarks.gpu import triton_aot

    for row in triton_aot.report(op, without):
        stores = set(re.findall(r"st\.global\S*", row.ptx))
        assert stores == ({"st.global.b8"} if "63x63x3" in row.name else {"st.global.b32"}), row.name


@pytest.mark.parametrize(("op", "without"), [compiling(op, RARE_WINDOWS) for op in ("pointwise", "residual_tail")])
def test_tensor_cores_get_rounded_tf32_operands(op: str, without: tuple[str, ...], compiled_ahead: None) -> None:
    """In PTX every register that they multiply is masked; on sm_90 both operands' elements are, once each.

    There the weight reaches them through shared memory; on sm_80 warps that share an operand round it once each.
    """
    from benchmarks.gpu import triton_aot
    from benchmarks.gpu.launches import recorded_launches

    seen = 0
    for name, call in triton_aot.cases():
        if not name.startswith(op):
            continue
        with recorded_launches() as launches:
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
    assert seen == {"pointwise": 6, "residual_tail": 2}[op]


def rounded_registers(ptx: str) -> set[str]:
    """Those that `activation.round_to_tf32` leaves its results in."""
    masked = set(re.findall(r"and\.b32\s+(%r\d+), %r\d+, -8192;", ptx))
    sums = re.findall(r"fma\.rn\.f32\s+(%r\d+), %r\d+, 0f0D800000, (%r\d+);", ptx)
    return {register for register, addend in sums if addend in masked}


@pytest.mark.slow
@pytest.mark.parametrize(("window", "without"), [compiling(window, ()) for window in RARE_WINDOWS])
def test_rare_windows_compile_without_spills(window: str, without: tuple[str, ...], compiled_ahead: None) -> None:
    assert_no_spills(window, without)
