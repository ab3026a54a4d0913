"""The CUDA kernels of depthwise_swish, emulated on the CPU, against the reference in fp64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.helpers.cuda_build import emulate
from vaebm_fast import reference
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward

GUARD = 64  # elements on either side of an output that no kernel may touch
SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}

# N, C, H, W, K: one pixel; a window larger than the image; several bands and strips; several words of channels, odd and
# even; images after one another; any window
SHAPES = [
    (1, 1, 1, 1, 5),
    (1, 3, 2, 3, 5),
    (1, 32, 19, 35, 5),
    (2, 71, 9, 18, 3),
    (3, 66, 3, 5, 5),
    (1, 98, 21, 17, 5),
    (1, 130, 10, 9, 3),
    (2, 5, 4, 6, 1),
    (1, 33, 6, 7, 7),
    (1, 6, 5, 13, 11),
]
CASES = [(shape, upsample, dtype) for shape in SHAPES for upsample in (False, True) for dtype in SUFFIX]


def case_name(case: object) -> str:
    return "x".join(map(str, case)) if isinstance(case, tuple) else str(case)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate("depthwise_swish", tmp_path_factory.mktemp("emulation"))


def tensors(shape: tuple[int, ...], upsample: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and a cotangent, NHWC, weight [K, K, C] and bias."""
    N, C, H, W, K = shape
    scale = 2 if upsample else 1
    h, dy = 3 * torch.randn(N, H, W, C), torch.randn(N, scale * H, scale * W, C)
    return h.to(dtype), dy.to(dtype), torch.randn(K, K, C).to(dtype), torch.randn(C).to(dtype)


def run(library: ctypes.CDLL, name: str, tensors: list[Tensor], h: Tensor, K: int, upsample: bool) -> Tensor:
    """The NHWC output of an emulated kernel, after checking that it wrote all of it and nothing beside it."""
    N, H, W, C = h.shape
    scale = 2 if upsample and name == "forward" else 1
    size = N * scale * H * scale * W * C
    memory = torch.full((size + 2 * GUARD,), torch.nan, dtype=h.dtype)
    sizes = [ctypes.c_bool(upsample), ctypes.c_int64(N), *map(ctypes.c_int, (H, W, C, K))]
    out = memory[GUARD : GUARD + size]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, out)]
    getattr(library, f"{name}_{SUFFIX[h.dtype]}")(*pointers[:-1], *sizes, pointers[-1])
    assert memory[:GUARD].isnan().all() and memory[GUARD + size :].isnan().all() and not out.isnan().any()
    return out.reshape(N, scale * H, scale * W, C)


def forward(library: ctypes.CDLL, h: Tensor, weight: Tensor, bias: Tensor, upsample: bool) -> Tensor:
    return run(library, "forward", [h, weight, bias], h, weight.shape[0], upsample)


def backward(library: ctypes.CDLL, dy: Tensor, h: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    return run(library, "backward", [dy, h, weight], h, weight.shape[0], upsample)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def plain_backward(dy: Tensor, h: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    """Plain PyTorch's gradient in the tensors' own precision; all NCHW."""
    h = h.detach().requires_grad_()
    y = reference.depthwise_swish(h, weight, torch.zeros_like(weight[0, 0]), upsample=upsample)
    return torch.autograd.grad(y, h, dy)[0]


def assert_as_accurate(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Error at most twice plain PyTorch's in the same precision, plus half an ulp of bf16, or 2^-20, of the largest."""
    floor = 2.0**-9 if result.dtype == torch.bfloat16 else 2.0**-20
    allowed = 2 * (plain.double() - truth).abs().max() + floor * truth.abs().max()
    assert (nchw(result).double() - truth).abs().max() <= allowed


@pytest.mark.parametrize(("shape", "upsample", "dtype"), CASES, ids=case_name)
def test_kernels_equal_the_reference(
    emulated: ctypes.CDLL, shape: tuple[int, ...], upsample: bool, dtype: torch.dtype
) -> None:
    h, dy, weight, bias = tensors(shape, upsample, dtype)
    plain = reference.depthwise_swish(nchw(h), weight, bias, upsample=upsample)
    truth = reference.depthwise_swish(nchw(h).double(), weight.double(), bias.double(), upsample=upsample)
    assert_as_accurate(forward(emulated, h, weight, bias, upsample), plain, truth)

    plain = plain_backward(nchw(dy), nchw(h), weight, upsample)
    truth = reference.depthwise_swish_backward(nchw(dy).double(), nchw(h).double(), weight.double(), upsample=upsample)
    assert_as_accurate(backward(emulated, dy, h, weight, upsample), plain, truth)


@pytest.mark.parametrize("upsample", [False, True])
def test_kernels_have_the_same_bits_whatever_the_place_in_the_batch(emulated: ctypes.CDLL, upsample: bool) -> None:
    h, dy, weight, bias = tensors((3, 34, 11, 9, 5), upsample, torch.float32)
    y, dh = forward(emulated, h, weight, bias, upsample), backward(emulated, dy, h, weight, upsample)
    assert torch.equal(forward(emulated, h[1:2], weight, bias, upsample), y[1:2])
    assert torch.equal(backward(emulated, dy[1:2], h[1:2], weight, upsample), dh[1:2])


def test_kernels_pad_with_zeros_not_with_neighbours(emulated: ctypes.CDLL) -> None:
    """Beside an image of zeros lie images of infinities; its output is the bias."""
    h, _, weight, bias = tensors((3, 8, 4, 5, 5), False, torch.float32)
    h[0] = h[2] = torch.inf
    h[1] = 0
    assert torch.equal(forward(emulated, h[1:2], weight, bias, False), bias.expand(1, 4, 5, 8))


def test_kernels_take_tensors_that_begin_within_a_word(emulated: ctypes.CDLL) -> None:
    tensors_ = tensors((2, 6, 3, 5, 5), False, torch.bfloat16)
    h, dy, weight, bias = tensors_
    shifted = [torch.cat((t.flatten()[:1], t.flatten()))[1:].reshape(t.shape) for t in tensors_]
    assert all(t.data_ptr() % 4 == 2 for t in shifted)
    expected, expected_dh = forward(emulated, h, weight, bias, False), backward(emulated, dy, h, weight, False)
    assert torch.equal(forward(emulated, shifted[0], shifted[2], shifted[3], False), expected)
    assert torch.equal(backward(emulated, shifted[1], shifted[0], shifted[2], False), expected_dh)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3, 5), (2, 0, 3, 3, 3), (1, 4, 0, 3, 7)])
def test_kernels_take_empty_tensors(emulated: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    h, dy, weight, bias = tensors(shape, True, torch.bfloat16)
    assert forward(emulated, h, weight, bias, True).numel() == backward(emulated, dy, h, weight, True).numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "upsample", "dtype"), CASES, ids=case_name)
def test_the_op_on_a_gpu_equals_the_reference(shape: tuple[int, ...], upsample: bool, dtype: torch.dtype) -> None:
    reason = why_not("depthwise_swish", torch.device("cuda"), "cuda")
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(reason or "there is no GPU")
    h, dy, weight, bias = (tensor.cuda() for tensor in tensors(shape, upsample, dtype))
    h, dy = nchw(h), nchw(dy)
    leaf = h.clone().requires_grad_()
    y = depthwise_swish(leaf, weight, bias, upsample=upsample, backend="cuda")
    (dh,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(dh, depthwise_swish_backward(dy, h, weight, upsample=upsample, backend="cuda"))

    plain = reference.depthwise_swish(h, weight, bias, upsample=upsample)
    truth = reference.depthwise_swish(h.double(), weight.double(), bias.double(), upsample=upsample)
    assert_as_accurate(y.detach().permute(0, 2, 3, 1), plain, truth)
    plain = plain_backward(dy, h, weight, upsample)
    truth = reference.depthwise_swish_backward(dy.double(), h.double(), weight.double(), upsample=upsample)
    assert_as_accurate(dh.permute(0, 2, 3, 1), plain, truth)
