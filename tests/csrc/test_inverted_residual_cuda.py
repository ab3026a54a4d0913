"""The CUDA kernels of inverted_residual, emulated on the CPU, against the reference in fp64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.cuda_work import inverted_residual_shared
from tests.helpers.builders import generic
from tests.helpers.cuda_build import emulate
from tests.helpers.stand_ins import StandIns, pretend_a_gpu
from vaebm_fast import reference
from vaebm_fast.frozen import cells
from vaebm_fast.frozen.cells import freeze_cell
from vaebm_fast.models.layers import Cell
from vaebm_fast.ops._backend import Backend, OpBackends, why_not
from vaebm_fast.ops.inverted_residual import (
    BlockWeights,
    PackedBlock,
    inverted_residual,
    inverted_residual_backward,
    pack_inverted_residual,
)

GUARD = 64  # elements on either side of an output that no kernel may touch

# N, C, H, W, hidden: one pixel; less than the window; several ragged blocks and chunks; several images; every C
SHAPES = [
    (1, 32, 1, 1, 32),
    (1, 32, 2, 3, 32),
    (1, 32, 18, 20, 64),
    (2, 32, 9, 17, 32),
    (1, 64, 10, 18, 64),
    (1, 128, 9, 5, 32),
]


def case_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate("inverted_residual", tmp_path_factory.mktemp("emulation"))


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, BlockWeights]:
    """x and a cotangent, NCHW in channels_last, and weights, scaled so that every stage is of the order of one."""
    N, C, H, W, hidden = shape
    x, ds = (torch.randn(N, H, W, C).bfloat16().permute(0, 3, 1, 2) for _ in range(2))
    weights = (
        2 * torch.randn(hidden, C) / C**0.5,
        torch.randn(hidden),
        torch.randn(5, 5, hidden) / 3,
        torch.randn(hidden),
        torch.randn(C, hidden) / hidden**0.5,
        torch.randn(C),
    )
    return x, ds, BlockWeights(*(weight.bfloat16() for weight in weights))


def twice_as_wide(weights: BlockWeights) -> BlockWeights:
    return BlockWeights(*(weight.double() for weight in weights))


class Output:
    """NaNs that a kernel is to overwrite, between guards that it is not to touch."""

    def __init__(self, N: int, C: int, H: int, W: int) -> None:
        self.shape = (N, H, W, C)
        self.memory = torch.full((N * H * W * C + 2 * GUARD,), torch.nan, dtype=torch.bfloat16)
        self.inner = self.memory[GUARD : self.memory.numel() - GUARD]

    def read(self) -> Tensor:
        assert self.memory[:GUARD].isnan().all() and self.memory[-GUARD:].isnan().all()
        assert not self.inner.isnan().any()
        return self.inner.reshape(self.shape).permute(0, 3, 1, 2)


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    assert all(t is None or t.data_ptr() % 16 == 0 or t.numel() == 0 for t in tensors)
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def forward(library: ctypes.CDLL, x: Tensor, w: PackedBlock, with_h2: bool = True) -> tuple[Tensor, Tensor | None]:
    N, C, H, W = x.shape
    hidden = 32 * len(w.weight)
    s, h2 = Output(N, C, H, W), Output(N, hidden, H, W)
    sizes = [ctypes.c_int64(N), *map(ctypes.c_int, (H, W, C, hidden))]
    outputs = pointers(s.inner, h2.inner if with_h2 else None)
    library.forward(*pointers(x, w.weight, w.project_bias), *sizes, *outputs)
    if not with_h2:
        assert h2.memory.isnan().all()
    return s.read(), h2.read() if with_h2 else None


def backward(library: ctypes.CDLL, ds: Tensor, x: Tensor, h2: Tensor, weight_t: Tensor) -> Tensor:
    N, C, H, W = x.shape
    dx = Output(N, C, H, W)
    sizes = [ctypes.c_int64(N), *map(ctypes.c_int, (H, W, C, 32 * len(weight_t)))]
    library.backward(*pointers(ds, x, h2, weight_t), *sizes, *pointers(dx.inner))
    return dx.read()


def assert_as_accurate(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Error at most twice the reference's, which rounds to bf16 at every step, plus half an ulp of the largest."""
    allowed = 2 * (plain.double() - truth).abs().max() + 2.0**-9 * truth.abs().max()
    assert (result.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
def test_the_kernel_equals_the_reference(emulated: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    x, _, w = tensors(shape)
    s, h2 = forward(emulated, x, pack_inverted_residual(w))
    plain, plain_h2 = reference.inverted_residual(x, *w, with_h2=True)
    truth, true_h2 = reference.inverted_residual(x.double(), *twice_as_wide(w), with_h2=True)
    assert h2 is not None and plain_h2 is not None and true_h2 is not None
    assert_as_accurate(h2, plain_h2, true_h2)
    assert_as_accurate(s, plain, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=case_name)
def test_the_backward_kernel_equals_the_reference(emulated: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    x, ds, w = tensors(shape)
    h2 = reference.inverted_residual(x, *w, with_h2=True)[1]
    assert h2 is not None
    h2 = h2.contiguous(memory_format=torch.channels_last)
    plain = inverted_residual_backward(ds, x, h2, w)
    truth = inverted_residual_backward(ds.double(), x.double(), h2.double(), twice_as_wide(w))
    assert_as_accurate(backward(emulated, ds, x, h2, pack_inverted_residual(w).weight_t), plain, truth)


def test_h2_is_written_only_where_it_is_asked_for(emulated: ctypes.CDLL) -> None:
    x, _, w = tensors((1, 32, 9, 5, 32))
    packed = pack_inverted_residual(w)
    assert torch.equal(forward(emulated, x, packed, with_h2=False)[0], forward(emulated, x, packed)[0])


def test_kernels_have_the_same_bits_whatever_the_place_in_the_batch(emulated: ctypes.CDLL) -> None:
    x, ds, w = tensors((3, 32, 5, 18, 64))
    packed = pack_inverted_residual(w)
    s, h2 = forward(emulated, x, packed)
    assert h2 is not None
    dx = backward(emulated, ds, x, h2, packed.weight_t)
    one = slice(1, 2)
    assert torch.equal(forward(emulated, x[one], packed)[0], s[one])
    assert torch.equal(backward(emulated, ds[one], x[one], h2[one], packed.weight_t), dx[one])


def test_kernels_pad_with_zeros_not_with_neighbours_or_the_bias(emulated: ctypes.CDLL) -> None:
    """An image of zeros between images of NaNs; h2 has 25 taps on swish(expand_bias) in its middle, 9 at a corner."""
    x, ds, w = tensors((3, 32, 5, 5, 32))
    x[0] = x[2] = ds[0] = ds[2] = torch.nan
    x[1] = 0
    packed, copying = pack_inverted_residual(w), torch.zeros_like(w.depthwise_weight)
    copying[2, 2] = 1
    copied = w._replace(depthwise_weight=copying, depthwise_bias=torch.zeros_like(w.depthwise_bias))
    s, h2 = forward(emulated, x[1:2], packed)
    _, levels = forward(emulated, x[1:2], pack_inverted_residual(copied))
    assert h2 is not None and levels is not None
    level = levels[0, :, 2, 2].double()  # swish(expand_bias) as the kernel has it
    assert_as_accurate(level, torch.nn.functional.silu(w.expand_bias), torch.nn.functional.silu(w.expand_bias.double()))
    taps, start = w.depthwise_weight.double(), w.depthwise_bias.double()
    torch.testing.assert_close(h2[0, :, 2, 2].double(), start + taps.sum((0, 1)) * level, rtol=2.0**-8, atol=1e-3)
    torch.testing.assert_close(
        h2[0, :, 0, 0].double(), start + taps[2:, 2:].sum((0, 1)) * level, rtol=2.0**-8, atol=1e-3
    )
    assert not backward(emulated, ds[1:2], x[1:2], h2, packed.weight_t).isnan().any()


@pytest.mark.parametrize("shape", [(0, 32, 3, 3, 32), (1, 64, 0, 3, 32), (2, 128, 3, 0, 32)], ids=case_name)
def test_kernels_take_empty_images(emulated: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    x, ds, w = tensors(shape)
    packed = pack_inverted_residual(w)
    s, h2 = forward(emulated, x, packed)
    assert h2 is not None and s.numel() == backward(emulated, ds, x, h2, packed.weight_t).numel() == 0


def test_a_frozen_cell_runs_on_the_kernels(
    emulated: ctypes.CDLL, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of its live module, within twice the error of the same cell in plain PyTorch."""
    live = generic(Cell(("mconv_e3k5g0",), 32, 32, use_se=True))
    x, dy, _ = tensors((1, 32, 9, 17, 96))
    leaf = x.double().requires_grad_()
    y = live(leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())

    def run(backend: Backend) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = freeze_cell("cell", live, torch.bfloat16, OpBackends.of(backend))(leaf)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    plain_y, plain_dx = run("reference")
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cells, "FUSED_SIDE", 1)

    def forward_kernel(x: Tensor, *packed_and_with_h2: Any) -> tuple[Tensor, Tensor | None]:
        *packed, with_h2 = packed_and_with_h2
        return forward(emulated, x, PackedBlock(*packed), with_h2)

    def backward_kernel(ds: Tensor, x: Tensor, h2: Tensor, weight_t: Tensor) -> Tensor:
        return backward(emulated, ds, x, h2, weight_t)

    kernels = {"inverted_residual": forward_kernel, "inverted_residual_backward": backward_kernel}
    with StandIns(kernels) as stand_ins:
        kernel_y, kernel_dx = run("cuda")
    assert stand_ins.calls["vaebm_fast::inverted_residual_backward"] == 1
    assert_as_accurate(kernel_y, plain_y, y)
    assert_as_accurate(kernel_dx, plain_dx, dx)


@pytest.mark.parametrize("C", [32, 64, 128])
@pytest.mark.parametrize("is_backward", [False, True])
def test_the_report_counts_the_shared_memory_of_a_block(emulated: ctypes.CDLL, C: int, is_backward: bool) -> None:
    assert emulated.shared_bytes(ctypes.c_int(C), ctypes.c_bool(is_backward)) == inverted_residual_shared(
        C, is_backward
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 64, 128, 128, 384)], ids=case_name)
def test_the_op_on_a_gpu_equals_the_reference(shape: tuple[int, ...]) -> None:
    reason = why_not("inverted_residual", torch.device("cuda"), "cuda")
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(reason or "there is no GPU")
    x, ds, w = tensors(shape)
    x, ds, w = x.cuda(), ds.cuda(), BlockWeights(*(weight.cuda() for weight in w))
    leaf, packed = x.clone().requires_grad_(), pack_inverted_residual(w)
    s, h2 = inverted_residual(leaf, packed, with_h2=True, backend="cuda")
    assert h2 is not None
    (dx,) = torch.autograd.grad(s, leaf, ds)
    assert torch.equal(dx, inverted_residual_backward(ds, x, h2, packed, backend="cuda"))

    truth, _ = reference.inverted_residual(x.double(), *twice_as_wide(w), with_h2=False)
    assert_as_accurate(s.detach(), reference.inverted_residual(x, *w, with_h2=False)[0], truth)
    plain = inverted_residual_backward(ds, x, h2, w)
    truth = inverted_residual_backward(ds.double(), x.double(), h2.double(), twice_as_wide(w))
    assert_as_accurate(dx, plain, truth)


@pytest.mark.gpu
def test_cpp_ops_pass_opcheck() -> None:
    reason = why_not("inverted_residual", torch.device("cuda"), "cuda")
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(reason or "there is no GPU")
    x, ds, w = tensors((2, 32, 9, 17, 64))
    x, ds, packed = x.cuda(), ds.cuda(), PackedBlock(*(part.cuda() for part in pack_inverted_residual(w)))
    ops = torch.ops.vaebm_fast
    for with_h2 in (False, True):
        torch.library.opcheck(ops.inverted_residual.default, (x, *packed, with_h2))
    torch.library.opcheck(ops.inverted_residual.default, (x.clone().requires_grad_(), *packed, True))
    h2 = ops.inverted_residual(x, *packed, True)[1]
    torch.library.opcheck(ops.inverted_residual_backward.default, (ds, x, h2, packed.weight_t))
