"""The CUDA kernels of power_iteration, emulated on the CPU, against the reference in fp64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.cuda_build import emulate
from vaebm_fast import reference
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.power_iteration import power_iteration

EPS = 1e-3
GUARD = 64  # elements on either side of a result that no kernel may touch

# B, M, K: one number; one row; one column; a depthwise convolution with strips of 32 and of 16 rows; each width of a
# block, with whole quads and without, its last column and one more
SHAPES = [
    (1, 1, 1),
    (2, 1, 33),
    (3, 37, 1),
    (1, 1043, 25),
    (2, 530, 9),
    (3, 7, 13),
    (2, 19, 256),
    (2, 17, 257),
    (1, 13, 516),
    (1, 5, 1024),
    (1, 9, 1029),
    (1, 3, 4096),
    (1, 3, 4100),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate("power_iteration", tmp_path_factory.mktemp("emulation"))


def tensors(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """W with entries of variance 1 / K, unit vectors u, and v, whose values do not matter."""
    B, M, K = shape
    return torch.randn(B, M, K) / K**0.5, F.normalize(torch.randn(B, M), dim=1), torch.full((B, K), torch.nan)


def run(library: ctypes.CDLL, weight: Tensor, u: Tensor, iterations: int, late: int = 0) -> tuple[Tensor, Tensor]:
    """u and v from emulated kernels, after checking that they wrote nothing beside them.

    Weight and v begin 16-byte aligned, or `late` elements after such a place.
    """
    (B, M, K), address = weight.shape, ctypes.c_void_p
    given = aligned(weight.numel(), late).copy_(weight.flatten())
    memory = aligned(B * (M + K) + 3 * GUARD, late).fill_(torch.nan)
    v = memory[GUARD : GUARD + B * K]
    left = memory[2 * GUARD + B * K : 2 * GUARD + B * (K + M)].copy_(u.flatten())
    library.power_iteration(
        address(given.data_ptr()), ctypes.c_int64(B), ctypes.c_int(M), ctypes.c_int(K), ctypes.c_int64(iterations),
        ctypes.c_float(EPS), address(left.data_ptr()), address(v.data_ptr()),
    )  # fmt: skip
    beside = memory.clone()
    beside[GUARD : GUARD + B * K] = beside[2 * GUARD + B * K : 2 * GUARD + B * (K + M)] = torch.nan
    assert beside.isnan().all()
    return left.reshape(B, M), v.reshape(B, K)


def aligned(size: int, late: int) -> Tensor:
    memory = torch.empty(size + 8)
    start = -(memory.data_ptr() // 4) % 4 + late
    return memory[start : start + size]


def error(actual: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """The largest distance of a vector from its truth."""
    return max(float((a.double().cpu() - t.cpu()).norm(dim=1).max()) for a, t in zip(actual, truth, strict=True))


def assert_as_accurate(actual: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor, Tensor], iterations: int) -> None:
    """Error at most twice plain PyTorch's, plus four ulps of a unit vector."""
    options: Any = {"iterations": iterations, "eps": EPS}
    truth = reference.power_iteration(*(tensor.double() for tensor in given), **options)
    plain = error(reference.power_iteration(*given, **options), truth)
    assert error(actual, truth) <= 2 * plain + 2**-21


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(emulated: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    given = tensors(shape)
    result, again = (run(emulated, *given[:2], 2) for _ in range(2))
    assert_as_accurate(result, given, 2)
    assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])


@pytest.mark.parametrize("beyond", [4, 5])
def test_kernels_read_a_wide_matrix_in_panels(emulated: ctypes.CDLL, beyond: int) -> None:
    given = tensors((1, 3, emulated.widest() + beyond))
    assert_as_accurate(run(emulated, *given[:2], 2), given, 2)


def test_kernels_have_the_same_bits_whatever_the_place_in_the_batch(emulated: ctypes.CDLL) -> None:
    weight, u, _ = tensors((3, 21, 132))
    together, alone = run(emulated, weight, u, 2), run(emulated, weight[1:2], u[1:2], 2)
    assert torch.equal(together[0][1:2], alone[0]) and torch.equal(together[1][1:2], alone[1])


def test_kernels_take_tensors_that_begin_within_a_quad(emulated: ctypes.CDLL) -> None:
    weight, u, _ = tensors((2, 9, 140))
    expected, result = run(emulated, weight, u, 2), run(emulated, weight, u, 2, late=1)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_kernels_divide_by_eps_where_a_matrix_is_small(emulated: ctypes.CDLL) -> None:
    weight, u, v = tensors((3, 20, 30))
    weight *= torch.tensor([1e-2, 1e-4, 1e-8])[:, None, None]
    truth = reference.power_iteration(weight.double(), u.double(), v.double(), iterations=3, eps=EPS)
    for actual, expected in zip(run(emulated, weight, u, 3), truth, strict=True):
        relative = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(relative.max()) < 1e-5


def test_kernels_give_zeros_for_a_zero_matrix_and_nans_for_a_nan(emulated: ctypes.CDLL) -> None:
    weight, u, _ = tensors((3, 9, 21))
    weight[0] = 0
    weight[1, 8, 20] = torch.nan
    left, right = run(emulated, weight, u, 1)
    assert not left[0].any() and not right[0].any()
    assert left[1].isnan().all() and right[1].isnan().all()
    assert left[2].isfinite().all() and right[2].isfinite().all()


def test_kernels_take_an_empty_batch(emulated: ctypes.CDLL) -> None:
    left, right = run(emulated, torch.empty(0, 5, 7), torch.empty(0, 5), 2)
    assert left.shape == (0, 5) and right.shape == (0, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 9221), (17, 512, 4608)], ids=str)
def test_the_op_on_a_gpu_equals_the_reference(shape: tuple[int, int, int]) -> None:
    reason = why_not("power_iteration", torch.device("cuda"), "cuda")
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(reason or "there is no GPU")
    weight, u, v = given = tuple(tensor.cuda() for tensor in tensors(shape))
    results = [power_iteration(*given, iterations=3, eps=EPS, backend="cuda") for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert_as_accurate(results[0], (weight, u, v), 3)
    strided = power_iteration(weight.mT.contiguous().mT, u, v, iterations=3, eps=EPS, backend="cuda")
    assert torch.equal(strided[0], results[0][0]) and torch.equal(strided[1], results[0][1])
    none = power_iteration(weight, u, torch.ones_like(v), iterations=0, eps=EPS, backend="cuda")
    assert torch.equal(none[0], u) and torch.equal(none[1], torch.ones_like(v))
