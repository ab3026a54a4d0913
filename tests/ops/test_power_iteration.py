"""Batched power iteration: singular values against the SVD, the kernel against the reference in fp64, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.power_iteration import power_iteration

EPS = 1e-3
# B, M, K: one number; odd; one row; one column; rows of several chunks; narrow and wide; convolutions of a model
SHAPES = [
    (1, 1, 1),
    (3, 7, 13),
    (2, 1, 33),
    (2, 37, 1),
    (2, 131, 31),
    (2, 576, 25),
    (1, 3, 1153),
    (3, 64, 576),
    (2, 96, 864),
]


def tensors(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W with entries of variance 1 / K, and unit vectors u and v; float32."""
    B, M, K = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(B, M, K, generator=generator) / K**0.5
    u, v = (F.normalize(torch.randn(B, size, generator=generator), dim=1) for size in (M, K))
    return weight, u, v


def with_singular_values(values: Tensor, M: int, K: int, B: int = 3) -> Tensor:
    """Random matrices [B, M, K] that have these singular values, in the dtype of `values`."""
    left, _ = torch.linalg.qr(torch.randn(B, M, len(values), dtype=values.dtype))
    right, _ = torch.linalg.qr(torch.randn(B, K, len(values), dtype=values.dtype))
    return left * values @ right.mT


def error(actual: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """The largest distance of a vector from its truth."""
    pairs = zip(actual, truth, strict=True)
    return max(float((a.double() - t).norm(dim=1).max()) for a, t in pairs)


@pytest.mark.parametrize("shape", [(6, 9), (40, 5), (5, 40), (1, 12), (12, 1)])
def test_reference_finds_the_largest_singular_value(shape: tuple[int, int]) -> None:
    weight = torch.randn(4, *shape, dtype=torch.float64)
    u, v = torch.randn(4, shape[0], dtype=torch.float64), torch.zeros(4, shape[1], dtype=torch.float64)
    u, v = reference.power_iteration(weight, u, v, iterations=3000, eps=EPS)
    sigma = torch.einsum("bm,bmk,bk->b", u, weight, v)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight)[:, 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_kernel_finds_the_singular_vectors_across_a_gap(backend: Any, compiled: None) -> None:
    """With a second value of half the first, an iteration takes the angle to the vectors to a quarter."""
    weight = with_singular_values(torch.tensor([2.0, 1.0, 0.9, 0.1]), 50, 70)
    u, v = torch.randn(3, 50), torch.zeros(3, 70)
    u, v = power_iteration(weight, u, v, iterations=25, eps=EPS, backend=backend)
    left, _, right = torch.linalg.svd(weight)
    sign = (u * left[:, :, 0]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(u * sign, left[:, :, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(v * sign, right[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.einsum("bm,bmk,bk->b", u, weight, v), torch.full((3,), 2.0))


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_as_close_to_the_fp64_reference_as_plain_pytorch(
    shape: tuple[int, int, int], iterations: int, compiled: None
) -> None:
    given = tensors(shape)
    options: Any = {"iterations": iterations, "eps": EPS}
    truth = reference.power_iteration(*(tensor.double() for tensor in given), **options)
    plain = error(reference.power_iteration(*given, **options), truth)
    kernel = power_iteration(*given, **options, backend="cpp")
    assert error(kernel, truth) <= 2 * plain + 2**-21  # the floor: four ulps of a unit vector


def test_kernel_divides_by_eps_where_a_matrix_is_small(compiled: None) -> None:
    weight, u, v = tensors((3, 20, 30))
    weight *= torch.tensor([1e-2, 1e-4, 1e-8])[:, None, None]
    result = power_iteration(weight, u, v, iterations=3, eps=EPS, backend="cpp")
    truth = reference.power_iteration(weight.double(), u.double(), v.double(), iterations=3, eps=EPS)
    for actual, expected in zip(result, truth, strict=True):
        relative = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(relative.max()) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_kernel_gives_zeros_for_a_zero_matrix_and_nans_for_a_nan(backend: Any, compiled: None) -> None:
    weight, u, v = tensors((3, 9, 21))
    weight[0] = 0
    weight[1, 8, 20] = float("nan")
    u, v = power_iteration(weight, u, v, iterations=2, eps=EPS, backend=backend)
    assert not u[0].any() and not v[0].any()
    assert u[1].isnan().all() and v[1].isnan().all()
    assert u[2].isfinite().all() and v[2].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 300, 40), (5, 70, 130)])
def test_kernel_gives_the_same_bits_for_any_number_of_threads_and_any_batch(
    shape: tuple[int, int, int], compiled: None
) -> None:
    weight, u, v = tensors(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):  # with four, three matrices are cut by rows
            torch.set_num_threads(threads)
            results.append(power_iteration(weight, u, v, iterations=3, eps=EPS, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    singles = zip(weight.split(1), u.split(1), v.split(1), strict=True)
    alone = [power_iteration(*single, iterations=3, eps=EPS, backend="cpp") for single in singles]
    results.append((torch.cat([u for u, _ in alone]), torch.cat([v for _, v in alone])))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


def test_iterations_add_up(compiled: None) -> None:
    weight, u, v = tensors((2, 20, 30))
    once = power_iteration(weight, u, v, iterations=3, eps=EPS, backend="cpp")
    twice = power_iteration(weight, *once, iterations=2, eps=EPS, backend="cpp")
    together = power_iteration(weight, u, v, iterations=5, eps=EPS, backend="cpp")
    assert error(twice, (together[0].double(), together[1].double())) < 1e-6
    for backend in ("reference", "cpp"):
        none: Any = power_iteration(weight, u, v, iterations=0, eps=EPS, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(none[0], u) and torch.equal(none[1], v)


@pytest.mark.parametrize("K", [32, 33])
def test_kernel_takes_any_strides(K: int, compiled: None) -> None:
    weight, u, v = tensors((3, 40, K))
    expected = power_iteration(weight, u, v, iterations=2, eps=EPS, backend="cpp")
    strided = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    result = power_iteration(strided, u.T.contiguous().T, v.T.contiguous().T, iterations=2, eps=EPS, backend="cpp")
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    repeated = power_iteration(weight[:1].expand(3, -1, -1), u, v, iterations=2, eps=EPS, backend="cpp")
    assert torch.equal(repeated[0][0], expected[0][0]) and not torch.equal(repeated[0][1], expected[0][1])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_an_empty_batch_gives_empty_vectors(backend: Any, compiled: None) -> None:
    u, v = power_iteration(*tensors((0, 5, 7)), iterations=2, eps=EPS, backend=backend)
    assert u.shape == (0, 5) and v.shape == (0, 7)


def test_arguments_stay_as_they_are(compiled: None) -> None:
    given = tensors((2, 16, 32))
    copies = [tensor.clone() for tensor in given]
    power_iteration(*given, iterations=2, eps=EPS, backend="cpp")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("K", [7, 16])
def test_cpp_op_passes_opcheck(K: int, iterations: int, compiled: None) -> None:
    weight, u, v = tensors((2, 16, K))
    op = torch.ops.vaebm_fast.power_iteration.default
    torch.library.opcheck(op, (weight, u, v, iterations, EPS))
    torch.library.opcheck(op, (weight.mT.contiguous().mT, u.T.contiguous().T, v, iterations, EPS))


@pytest.mark.parametrize("asked", ["weight", "u", "v"])
def test_a_gradient_is_refused(asked: str, compiled: None) -> None:
    weight, u, v = tensors((1, 4, 6))
    {"weight": weight, "u": u, "v": v}[asked].requires_grad_()
    for backend in ("reference", "cpp"):
        with pytest.raises(ValueError, match="power_iteration has no gradient"):
            power_iteration(weight, u, v, iterations=1, eps=EPS, backend=backend)  # type: ignore[arg-type]
    result = torch.ops.vaebm_fast.power_iteration(weight, u, v, 1, EPS)
    with pytest.raises(RuntimeError, match="power_iteration has no gradient"):
        result[0].square().sum().backward()
    with torch.no_grad():
        assert not power_iteration(weight, u, v, iterations=1, eps=EPS)[0].requires_grad


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors((1, 4, 6))
    monkeypatch.setattr(_backend.extension, "_why_missing", "the compiled part has not been built")
    with pytest.raises(RuntimeError, match="power_iteration cannot run with backend='cpp': the compiled part has not"):
        power_iteration(*given, iterations=1, eps=EPS, backend="cpp")
    expected = reference.power_iteration(*given, iterations=1, eps=EPS)
    assert torch.equal(power_iteration(*given, iterations=1, eps=EPS)[0], expected[0])


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    weight, u, v = (tensor.double() for tensor in tensors((1, 4, 6)))
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            power_iteration(weight, u, v, iterations=1, eps=EPS, backend=backend)  # type: ignore[arg-type]
    assert power_iteration(weight, u, v, iterations=1, eps=EPS, backend="reference")[0].dtype == torch.float64


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.zeros(3, 4)}, "weight must be"),
    ({"weight": torch.zeros(2, 3, 0), "v": torch.zeros(2, 0)}, "with M, K >= 1"),
    ({"weight": torch.zeros(2, 0, 4), "u": torch.zeros(2, 0)}, "with M, K >= 1"),
    ({"weight": torch.zeros(2, 3, 4, dtype=torch.int64)}, "weight must be"),
    ({"u": torch.zeros(2, 4)}, "u must be"),
    ({"u": torch.zeros(3)}, "u must be"),
    ({"u": torch.zeros(2, 3).double()}, "u "),
    ({"v": torch.zeros(2, 3)}, "v must be"),
    ({"v": torch.zeros(1, 4)}, "v must be"),
    ({"v": torch.zeros(2, 4).double()}, "v "),
    ({"v": torch.zeros(2, 4, device="meta")}, "v is on meta but weight is on cpu"),
    ({"iterations": -1}, "iterations is -1; it must not be negative"),
    ({"eps": 0.0}, "eps is 0.*; it must be positive"),
    ({"eps": float("nan")}, "eps is nan; it must be positive"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Any], sentence: str) -> None:
    given = {
        "weight": torch.zeros(2, 3, 4),
        "u": torch.zeros(2, 3),
        "v": torch.zeros(2, 4),
        "iterations": 1,
        "eps": EPS,
    }
    given |= change
    with pytest.raises(ValueError, match=sentence):
        power_iteration(**given)
    on_cpu = all(given[name].device.type == "cpu" for name in ("weight", "u", "v"))
    if on_cpu and why_not("power_iteration", torch.device("cpu"), "cpp") is None:
        with pytest.raises(ValueError, match=sentence):
            torch.ops.vaebm_fast.power_iteration(**given)
