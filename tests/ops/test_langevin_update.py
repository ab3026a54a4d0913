"""One Langevin step in place: the reference's formula and law, the same bits everywhere, the flag, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import (
    assert_never_falls_back,
    assert_refused,
    assert_same_bits_for_any_number_of_threads,
    device_of,
    strided,
)
from vaebm_fast import reference
from vaebm_fast.chain.noise import draw_tensor, seed_tensor
from vaebm_fast.ops._backend import Backend, why_not
from vaebm_fast.ops.langevin_update import langevin_update

SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1]
# D: within a quad; a block of the CPU; ragged; two blocks of Triton; several tasks of threads
SIZES = [1, 3, 4, 63, 64, 66, 1001, 1030, 20_000]
DRAWS = [1, 2**31, 2**32 - 1, 2**32 + 5]


@pytest.fixture(
    params=["reference", "cpp", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Those of Triton run on a GPU, and in the interpreter by `test_triton.py`."""
    name: Backend = request.param
    reason = why_not("langevin_update", device_of(name), name)
    if reason is None and device_of(name).type == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible"
    if reason is not None:
        pytest.skip(reason)
    return name


def run(
    backend: Backend, eps: Tensor, gradient: Tensor, seeds: list[int] = SEEDS, draw: int = 1, **options: Any
) -> tuple[Tensor, Tensor]:
    """The moved state and the flags, on the CPU; `eps` stays as it is."""
    device = device_of(backend)
    state, keys = eps.to(device, copy=True), seed_tensor(seeds[: len(eps)], device)
    options = {"stream": 0, "step_size": 0.3, "prior": False, **options}
    nonfinite_at = options.pop("nonfinite_at", torch.full_like(keys, -1)).to(device, copy=True)
    k = torch.tensor(draw, device=device)
    langevin_update(state, gradient.to(device), keys, k, nonfinite_at, **options, backend=backend)
    return state.cpu(), nonfinite_at.cpu()


@pytest.mark.parametrize("prior", [False, True])
def test_reference_is_the_formula_in_float64_to_the_last_places(prior: bool) -> None:
    eps, gradient, h = torch.randn(5, 1001), torch.randn(5, 1001), 0.3
    z = reference.philox_normal(seed_tensor(SEEDS), draw_tensor(7), stream=2, numel=1001).double()
    state, nonfinite_at = run("reference", eps, gradient, draw=7, stream=2, step_size=h, prior=prior)
    slope = gradient.double() + (eps.double() if prior else 0)
    torch.testing.assert_close(state.double(), eps.double() - h / 2 * slope + math.sqrt(h) * z, rtol=0, atol=2.0**-20)
    assert nonfinite_at.tolist() == [-1] * 5


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("D", SIZES)
def test_kernel_equals_the_reference_bit_for_bit(D: int, prior: bool, backend: Backend) -> None:
    eps, gradient = 3 * torch.randn(5, D), 10 * torch.randn(5, D)
    for draw in DRAWS:
        for step_size in (3e-6, 0.3):
            options: Any = {"draw": draw, "stream": 2**32 - 1, "step_size": step_size, "prior": prior}
            expected, _ = run("reference", eps, gradient, **options)
            state, nonfinite_at = run(backend, eps, gradient, **options)
            assert torch.equal(state, expected) and nonfinite_at.tolist() == [-1] * 5


def test_kernel_gives_an_image_the_same_bits_in_any_batch(backend: Backend) -> None:
    eps, gradient = torch.randn(5, 333), torch.randn(5, 333)
    together, _ = run(backend, eps, gradient)
    backwards, _ = run(backend, eps.flip(0), gradient.flip(0), SEEDS[::-1])
    alone = [run(backend, eps[n : n + 1], gradient[n : n + 1], SEEDS[n:])[0] for n in range(5)]
    assert torch.equal(backwards.flip(0), together) and torch.equal(torch.cat(alone), together)


def test_kernel_gives_the_same_bits_for_any_number_of_threads(compiled: None) -> None:
    eps, gradient = torch.randn(3, 70_001), torch.randn(3, 70_001)
    gradient[1, [5, 50_000, 70_000]] = math.inf  # found by several threads
    assert_same_bits_for_any_number_of_threads(lambda: [x.nan_to_num() for x in run("cpp", eps, gradient)])


def test_kernel_takes_a_gradient_and_seeds_of_any_strides_and_a_state_that_begins_anywhere(backend: Backend) -> None:
    eps, gradient = torch.randn(4, 64), torch.randn(4, 64)
    expected, _ = run("reference", eps, gradient)
    device = device_of(backend)
    keys = seed_tensor([seed for seed in SEEDS[:4] for _ in range(2)], device)[::2]
    draw = draw_tensor(1, device).reshape(1)
    for given in (strided(gradient.to(device)), gradient.to(device).T.contiguous().T):
        for offset in (0, 1, 2):
            state = torch.empty(4 * 64 + offset, device=device)[offset:].view(4, 64).copy_(eps)
            flags = torch.full((4,), -1, device=device)
            langevin_update(state, given, keys, draw, flags, stream=0, step_size=0.3, backend=backend)
            assert torch.equal(state.cpu(), expected)


def test_the_gradient_may_be_the_state_itself(backend: Backend) -> None:
    device = device_of(backend)
    eps = torch.randn(2, 101)
    expected, _ = run("reference", eps, eps.clone())
    state, keys = eps.to(device, copy=True), seed_tensor(SEEDS[:2], device)
    langevin_update(
        state, state, keys, draw_tensor(1, device), torch.full_like(keys, -1), stream=0, step_size=0.3, backend=backend
    )
    assert torch.equal(state.cpu(), expected)


@pytest.mark.parametrize(("N", "D"), [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_move(N: int, D: int, backend: Backend) -> None:
    state, nonfinite_at = run(backend, torch.zeros(N, D), torch.zeros(N, D))
    assert state.shape == (N, D) and nonfinite_at.tolist() == [-1] * N


# The flag.
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("D", [1, 6, 64, 1001])
def test_kernel_flags_the_images_that_are_not_finite_and_moves_the_others(D: int, bad: float, backend: Backend) -> None:
    for where in sorted({0, D // 2, D - 1}):
        eps, gradient = torch.randn(5, D), torch.randn(5, D)
        gradient[1, where] = bad
        eps[4, where] = bad
        state, nonfinite_at = run(backend, eps, gradient, draw=7)
        assert nonfinite_at.tolist() == [-1, 7, -1, -1, 7]
        expected, _ = run("reference", eps, gradient, draw=7)
        torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)


def test_kernel_flags_what_overflows(backend: Backend) -> None:
    eps, gradient = torch.zeros(2, 5), torch.zeros(2, 5)
    gradient[1, 3] = 3e38
    state, nonfinite_at = run(backend, eps, gradient, step_size=4.0)
    assert nonfinite_at.tolist() == [-1, 1] and state[1, 3] == -math.inf


def test_kernel_keeps_the_first_draw_that_was_not_finite(backend: Backend) -> None:
    zeros, eps = torch.zeros(4, 9), torch.zeros(4, 9)
    eps[1:, 2] = math.nan
    before = torch.tensor([-1, -1, 3, 0])
    for draw, expected in ((5, [-1, 5, 3, 0]), (2**32 + 6, [-1, 6, 3, 0]), (2**32 - 1, [-1, 2**32 - 1, 3, 0])):
        assert run(backend, eps, zeros, draw=draw, nonfinite_at=before)[1].tolist() == expected
    assert torch.equal(run(backend, zeros, zeros, draw=9, nonfinite_at=before)[1], before), "even if finite again"


# The law.
@pytest.mark.parametrize("prior", [False, True])
def test_stationary_variance_in_a_bowl_is_one_over_one_minus_a_quarter_step(prior: bool, backend: Backend) -> None:
    """U = |eps|^2 / 2, whose gradient the update is given or adds itself."""
    device, h = device_of(backend), 1.0
    seeds, draw = seed_tensor(range(8), device), draw_tensor(0, device)
    eps, flags = torch.zeros(8, 4000, device=device), torch.full_like(seeds, -1)
    for _ in range(30):
        gradient = torch.zeros_like(eps) if prior else eps.clone()
        langevin_update(eps, gradient, seeds, draw.add_(1), flags, stream=0, step_size=h, prior=prior, backend=backend)
    expected = 1 / (1 - h / 4)
    # 5 standard deviations of the estimate; what is missing of the limit is below 1e-17
    assert abs(float(eps.double().var()) - expected) < 5 * expected * math.sqrt(2 / eps.numel())
    assert (flags == -1).all()


# Arguments.
def arguments(**change: Any) -> dict[str, Any]:
    given = {
        "eps": torch.zeros(2, 5),
        "gradient": torch.zeros(2, 5),
        "seeds": seed_tensor([1, 2]),
        "draw": draw_tensor(1),
        "nonfinite_at": torch.full((2,), -1),
        "stream": 0,
        "step_size": 0.1,
        "prior": False,
    }
    return given | change


BAD = [
    ({"eps": torch.zeros(5)}, r"eps must be float32 \[N, D\] and contiguous"),
    ({"eps": torch.zeros(2, 5, dtype=torch.float64)}, r"eps must be float32 \[N, D\] and contiguous"),
    ({"eps": torch.zeros(5, 2).T}, r"eps must be float32 \[N, D\] and contiguous; .* strides \[1, 2\]"),
    ({"gradient": torch.zeros(2, 4)}, r"gradient must be .*\[2, 5\]; it is "),
    ({"gradient": torch.zeros(2, 5).bfloat16()}, "gradient "),
    ({"gradient": torch.zeros(2, 5, device="meta")}, "gradient is on meta; move it to cpu"),
    ({"seeds": seed_tensor([1])}, r"seeds must be .*\[2\].* \[1\]"),
    ({"seeds": torch.zeros(2)}, "seeds must be int64"),
    ({"draw": torch.zeros(())}, "draw must be one int64 number"),
    ({"nonfinite_at": torch.full((3,), -1)}, r"nonfinite_at must be .*\[2\].*; it is .*\[3\]"),
    ({"nonfinite_at": torch.full((2,), -1, dtype=torch.int32)}, "nonfinite_at "),
    ({"nonfinite_at": torch.full((4,), -1)[::2]}, "nonfinite_at must be .*contiguous"),
    ({"stream": -1}, "stream is -1"),
    ({"step_size": 0.0}, "step_size is 0.*; it must be a positive number"),
    ({"step_size": math.nan}, "step_size is nan; it must be a positive number"),
    ({"step_size": math.inf}, "step_size is inf; it must be a positive number"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Any], sentence: str) -> None:
    assert_refused(langevin_update, torch.ops.vaebm_fast.langevin_update, arguments(**change), sentence)


@pytest.mark.parametrize("name", ["eps", "gradient"])
def test_a_gradient_is_refused_where_autograd_is_on(name: str) -> None:
    given = arguments(**{name: torch.zeros(2, 5, requires_grad=True)})
    with pytest.raises(ValueError, match=r"langevin_update has no gradient; call it under torch.no_grad\(\)"):
        langevin_update(**given)
    with torch.no_grad():
        langevin_update(**given)
    assert given["eps"].any()


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    assert_never_falls_back(monkeypatch, "langevin_update", lambda: langevin_update(**given, backend="cpp"))
    assert not given["eps"].any()


@pytest.mark.parametrize("prior", [False, True])
def test_cpp_op_passes_opcheck(prior: bool, compiled: None) -> None:
    given = arguments(prior=prior, eps=torch.randn(2, 5), gradient=torch.randn(2, 5))
    torch.library.opcheck(torch.ops.vaebm_fast.langevin_update.default, tuple(given.values()))
