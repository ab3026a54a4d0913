"""The report on the GPU kernels: occupancy, every kernel in it, and the document that holds it."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.gpu.cuda_work import Work, depthwise_windows, kernels
from benchmarks.gpu.kernels import (
    A100,
    DOCUMENT,
    H200,
    Resources,
    compile_kernels,
    prediction_table,
    read_ptxas,
)

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2vf3addILi5EEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN2vf3addILi5EEEvPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 10240 bytes smem, 448 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "on_a100", "on_h200"),
    [
        (32, 0, 1024, 2, 2),  # by warps
        (64, 0, 256, 4, 4),  # by registers
        (168, 0, 128, 3, 3),
        (33, 0, 32, 32, 32),  # by blocks
        (32, 100 << 10, 128, 1, 2),  # by shared memory
        (32, 81 << 10, 128, 2, 2),  # two blocks cost 2 KB besides
        (32, 82 << 10, 128, 1, 2),
    ],
)
def test_blocks_per_sm(registers: int, shared: int, threads: int, on_a100: int, on_h200: int) -> None:
    for resources, dynamic in ((Resources(registers, shared, 0), 0), (Resources(registers, 0, 0), shared)):
        assert resources.blocks_per_sm(A100, threads, dynamic) == on_a100
        assert resources.blocks_per_sm(H200, threads, dynamic) == on_h200


def test_peak_rates_are_those_of_the_data_sheets() -> None:
    work = Work(memory_bytes=4.8e12, fp32_flop=66.9e12, tensor_flop=989e12)
    times_s = H200.times_s(work)
    assert all(times_s[unit] == pytest.approx(1, rel=1e-3) for unit in ("memory", "fp32", "tensor"))
    assert A100.times_s(Work(0, fp32_flop=19.5e12))["fp32"] == pytest.approx(1, rel=1e-2)


def test_reader_of_ptxas() -> None:
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not on the PATH")
    assert read_ptxas(PTXAS) == {"add<5>": Resources(registers=40, shared=10240, spilled=20)}


@pytest.mark.slow
def test_every_kernel_has_one_row_and_the_windows_are_those_of_the_kernels() -> None:
    if not shutil.which("nvcc") or not shutil.which("c++filt"):
        pytest.skip("nvcc or c++filt is not on the PATH")
    compiled = compile_kernels("sm_80")
    assert sorted(compiled) == sorted(kernel.symbol for kernel in kernels())
    for K in (3, 5):
        for window in depthwise_windows(K):
            for dtype, bytes_per_word in (("float", 4), ("Bf16", 8)):
                two_steps = 2 * window.stride * window.columns(window.width) * 32 * bytes_per_word
                symbol = f"depthwise_swish_kernel<{dtype}, Window<{K}, (Form){window.form}>>"
                assert compiled[symbol].shared == two_steps


def test_the_document_holds_this_prediction() -> None:
    assert prediction_table(kernels()) in DOCUMENT.read_text(encoding="utf-8"), "Run python -m benchmarks kernels."


def test_the_document_holds_the_prediction_for_every_triton_launch() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu import triton_work

    rows = [row.kernel for row in triton_work.rows(without=triton_work.RARE)]
    assert len({row.label for row in rows}) == len(rows)
    assert prediction_table(rows) in DOCUMENT.read_text(encoding="utf-8"), "Run python -m benchmarks kernels."


def test_work_of_a_triton_product_is_that_of_its_matrices() -> None:
    """1536 -> 20 channels of 16 images of 32 x 32 pixels in bfloat16, swish in front."""
    pytest.importorskip("triton")
    from benchmarks.gpu import triton_work

    work = next(row.kernel.work for row in triton_work.rows() if row.kernel.label == "pointwise 1536->20 bf16")
    pixels = 16 * 32 * 32
    assert work.tensor_flop == 2 * pixels * 1536 * 20 and work.special == 2 * pixels * 1536
    assert work.memory_bytes == 2 * (pixels * (1536 + 20 + 20) + 1536 * 20 + 20)  # x, residual, y; weight; bias


def test_work_of_a_tf32_product_is_twice_as_much_and_rounding() -> None:
    """768 -> 128 channels in blocks of 128 pixels and 128 channels: x is read once, the weight by 512 blocks."""
    pytest.importorskip("triton")
    from benchmarks.gpu import triton_work

    work = next(row.kernel.work for row in triton_work.rows() if row.kernel.label == "pointwise 768->128 tf32 fp32")
    pixels = 16 * 64 * 64
    assert work.tensor_flop == 2 * 2 * pixels * 768 * 128
    assert work.integer == 2 * (pixels * 768 + 512 * 768 * 128)
