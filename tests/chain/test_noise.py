"""Counter-based noise: bits against numpy, statistics, accuracy, and the layout of an image's noise vector."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import philox_numpy
from tests.helpers.kernels import device_of
from vaebm_fast import reference
from vaebm_fast.chain import noise
from vaebm_fast.chain.noise import Stream, draw_tensor, seed_tensor
from vaebm_fast.config import PRESETS, NoiseLayout
from vaebm_fast.ops._backend import Backend, why_not
from vaebm_fast.ops.philox_normal import philox_normal, philox_uniform, philox_words

SEEDS = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(
    params=["reference", "cpp", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Those of Triton run on a GPU, and in the interpreter by `test_triton.py`."""
    name: Backend = request.param
    reason = why_not("philox_normal", device_of(name), name)
    if reason is None and device_of(name).type == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible"
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def many_normals() -> Tensor:
    """2^22 normals: [4 draws, 16 seeds, 2^16 elements]."""
    seeds = seed_tensor(range(16))
    return torch.stack([noise.normal(seeds, draw, Stream.CHAIN, 2**16) for draw in range(4)])


def bits(x: Tensor) -> list[int]:
    return x.cpu().contiguous().view(torch.int32).flatten().tolist()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_numpy_truth_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(philox_numpy.philox4x32_10(np.array(counter, dtype=np.uint64), key)) == expected


@pytest.mark.parametrize("numel", [1, 3, 4, 63, 64, 65, 1001])
@pytest.mark.parametrize(("draw", "stream"), [(0, 0), (1, 6), (2**32 - 1, 2**32 - 1)])
def test_words_and_normals_equal_numpy_bit_for_bit(backend: Backend, draw: int, stream: int, numel: int) -> None:
    seeds, k = seed_tensor(SEEDS, device_of(backend)), draw_tensor(draw, device_of(backend))
    words = philox_words(seeds, k, stream=stream, numel=numel, backend=backend)
    normals = philox_normal(seeds, k, stream=stream, numel=numel, backend=backend)
    assert words.dtype == torch.int32 and normals.dtype == torch.float32
    expected_words = np.stack([philox_numpy.words(seed, draw, stream, numel) for seed in SEEDS])
    expected_normals = np.stack([philox_numpy.normals(seed, draw, stream, numel) for seed in SEEDS])
    assert bits(words) == expected_words.view(np.int32).ravel().tolist()
    assert bits(normals) == expected_normals.view(np.int32).ravel().tolist()


def test_reference_equals_numpy_at_the_edges_of_the_words() -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(philox_numpy.edge_words(), philox_numpy.edge_words()))
    z = reference._box_muller(torch.from_numpy(a.astype(np.int64)), torch.from_numpy(b.astype(np.int64)))
    assert bits(z) == np.stack(philox_numpy.box_muller(a, b), axis=-1).view(np.int32).ravel().tolist()
    assert torch.isfinite(z).all()


@pytest.mark.parametrize(("images", "numel"), [(0, 7), (3, 0), (0, 0), (1, 5)])
def test_empty_and_single_requests_have_their_shape(backend: Backend, images: int, numel: int) -> None:
    seeds, draw = seed_tensor(range(images), device_of(backend)), draw_tensor(0, device_of(backend))
    assert philox_normal(seeds, draw, stream=0, numel=numel, backend=backend).shape == (images, numel)
    assert philox_words(seeds, draw, stream=0, numel=numel, backend=backend).shape == (images, numel)


def test_noise_is_independent_of_batch_position_and_of_numel(backend: Backend) -> None:
    device = device_of(backend)
    whole = noise.normal(seed_tensor(range(10), device), 3, Stream.CHAIN, 500, backend=backend)
    some = noise.normal(seed_tensor([7, 2], device), 3, Stream.CHAIN, 90, backend=backend)
    assert torch.equal(some, whole[[7, 2], :90])


def test_noise_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2):
            torch.set_num_threads(count)
            draws.append(noise.normal(seed_tensor(range(3)), 1, Stream.CHAIN, 70_001))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)


def test_strided_seeds_and_a_draw_of_one_element_are_read_correctly(backend: Backend) -> None:
    device = device_of(backend)
    strided = seed_tensor(range(12), device)[::3]
    expected = noise.normal(seed_tensor([0, 3, 6, 9], device), 5, Stream.CHAIN, 33, backend=backend)
    draw = draw_tensor(5, device).reshape(1)
    assert torch.equal(philox_normal(strided, draw, stream=0, numel=33, backend=backend), expected)


def test_adding_to_the_draw_in_place_gives_the_next_draw(backend: Backend) -> None:
    seeds, draw = seed_tensor([11], device_of(backend)), draw_tensor(1, device_of(backend))
    draw.add_(1)
    second = philox_normal(seeds, draw, stream=0, numel=8, backend=backend)
    assert torch.equal(second, noise.normal(seeds, 2, Stream.CHAIN, 8, backend=backend))


def test_only_the_low_32_bits_of_a_draw_tensor_count(backend: Backend) -> None:
    seeds = seed_tensor([11], device_of(backend))
    wrapped = torch.tensor(2**32 + 5, device=device_of(backend))
    expected = noise.normal(seeds, 5, Stream.CHAIN, 8, backend=backend)
    assert torch.equal(philox_normal(seeds, wrapped, stream=0, numel=8, backend=backend), expected)


def test_seeds_and_draws_out_of_range_are_rejected() -> None:
    assert seed_tensor([2**64 - 1]).tolist() == [-1]
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"Seed {seed} is out of range"):
            seed_tensor([0, seed])
    with pytest.raises(TypeError):
        seed_tensor([1.5])  # type: ignore[list-item]
    for draw in (-1, 2**32):
        with pytest.raises(ValueError, match=f"Draw {draw} is out of range"):
            noise.normal(seed_tensor([0]), draw, Stream.CHAIN, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, "seeds must be int64"),
        ({"seeds": torch.zeros(2)}, "seeds must be int64"),
        ({"draw": torch.zeros(2, dtype=torch.int64)}, "draw must be one int64 number"),
        ({"draw": torch.zeros(())}, "draw must be one int64 number"),
        ({"stream": 2**32}, "stream is 4294967296"),
        ({"numel": -1}, "numel is -1"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected_in_python_and_in_cpp(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"seeds": seed_tensor([0]), "draw": draw_tensor(0), "stream": 0, "numel": 4} | change
    for op in (philox_words, philox_normal):
        with pytest.raises(ValueError, match=sentence):
            op(**arguments)
    skip_without_compiled_part()
    for op in (torch.ops.vaebm_fast.philox_words, torch.ops.vaebm_fast.philox_normal):
        with pytest.raises(ValueError, match=sentence):
            op(**arguments)


def test_a_draw_on_another_device_is_rejected() -> None:
    with pytest.raises(ValueError, match="draw is on meta but seeds are on cpu"):
        philox_normal(seed_tensor([0]), draw_tensor(0, "meta"), stream=0, numel=4)


def skip_without_compiled_part() -> None:
    reason = why_not("philox_normal", torch.device("cpu"), "cpu")
    if reason is not None:
        pytest.skip(reason)


def test_cpp_ops_pass_opcheck() -> None:
    skip_without_compiled_part()
    for op in (torch.ops.vaebm_fast.philox_words, torch.ops.vaebm_fast.philox_normal):
        torch.library.opcheck(op.default, (seed_tensor(range(3)), draw_tensor(1), 0, 10))


def test_normals_have_the_moments_and_tails_of_a_gaussian(many_normals: Tensor) -> None:
    z = many_normals.flatten().double()
    n = z.numel()
    five_sigma = 5 / math.sqrt(n)
    assert abs(z.mean()) < five_sigma
    assert abs(z.square().mean() - 1) < math.sqrt(2) * five_sigma
    assert abs(z.pow(3).mean()) < math.sqrt(15) * five_sigma
    assert abs(z.pow(4).mean() - 3) < math.sqrt(96) * five_sigma
    for threshold in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(threshold / math.sqrt(2))
        assert abs((z.abs() > threshold).double().mean() - p) < math.sqrt(p * (1 - p)) * five_sigma


def test_normals_follow_the_gaussian_cdf(many_normals: Tensor) -> None:
    z = many_normals.flatten().sort().values.double()
    n = z.numel()
    cdf, ranks = torch.special.ndtr(z), torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - ranks[:-1]).max(), (ranks[1:] - cdf).max())
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov: exceeded by one sample in a thousand


def test_normals_are_uncorrelated_across_elements_draws_seeds_and_streams(many_normals: Tensor) -> None:
    z = many_normals.double()
    other = noise.normal(seed_tensor(range(16)), 0, Stream.TRAIN_POSTERIOR, 2**16).double()
    pairs = {"draws": (z[:-1], z[1:]), "seeds": (z[:, :-1], z[:, 1:]), "streams": (z[0], other)}
    pairs |= {f"elements {lag} apart": (z[..., :-lag], z[..., lag:]) for lag in (1, 2, 3, 4, 8, 64)}
    for between, (x, y) in pairs.items():
        five_sigma = 5 / math.sqrt(x.numel())
        assert abs((x * y).mean()) < five_sigma, between
        assert abs(((x.square() - 1) * (y.square() - 1)).mean()) < 2 * five_sigma, between


def test_uniforms_are_inside_the_unit_interval_and_uniform() -> None:
    u = noise.uniform(seed_tensor(range(4)), 0, Stream.READJUST, 2**18).flatten().double()
    n = u.numel()
    assert u.min() > 0 and u.max() < 1
    distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)


def test_uniforms_are_the_same_on_every_backend(backend: Backend) -> None:
    device = device_of(backend)
    u = philox_uniform(seed_tensor([5], device), draw_tensor(1, device), stream=2, numel=101, backend=backend)
    expected = ((philox_numpy.words(5, 1, 2, 101) >> 9) * 2.0 + 1.0) * 2.0**-24
    assert u.cpu().tolist() == [expected.tolist()]


def test_normals_are_within_2e_7_of_their_radius_of_a_float64_box_muller() -> None:
    """Given the float32 u. Rounding u itself moves z by at most 1e-6, but for the radii below 0.1 (2.5e-4 there)."""
    pairs = philox_numpy.words(1, 0, 0, 2**20).reshape(-1, 2)
    edges = philox_numpy.edge_words()
    a, b = np.concatenate((pairs[:, 0], edges)), np.concatenate((pairs[:, 1], edges[::-1]))
    u, angle = philox_numpy.unit(a).astype(np.float64), 2 * np.pi * (b / 2**32)
    z, circle = np.stack(philox_numpy.box_muller(a, b)), np.stack((np.cos(angle), np.sin(angle)))
    radius = np.sqrt(-2 * np.log(u))
    assert (np.abs(z - radius * circle) <= 2e-7 * radius).all()
    exact_radius = np.sqrt(-2 * np.log(a / 2**32 + 2.0**-33))
    error = np.abs(z - exact_radius * circle)
    assert error[:, exact_radius > 0.1].max() < 1e-6
    assert error.max() < 2.5e-4


def test_polynomials_err_by_less_than_their_rounding() -> None:
    t = np.linspace(math.sqrt(0.5) - 1, math.sqrt(2) - 1, 100_000)
    t = t[t != 0]
    log_m = t + t * t * np.polyval(reference.LOG_COEFFICIENTS, t)
    assert np.abs(log_m / np.log1p(t) - 1).max() < 2.0**-27.3
    x = np.linspace(1e-3, np.pi / 4, 100_000)
    sine = x + x**3 * np.polyval(reference.SIN_COEFFICIENTS, x * x)
    cosine = 1 + x * x * np.polyval(reference.COS_COEFFICIENTS, x * x)
    assert np.abs(sine / np.sin(x) - 1).max() < 2.0**-27.8
    assert np.abs(cosine / np.cos(x) - 1).max() < 2.0**-32.8


LAYOUT = NoiseLayout([(2, 1, 1), (2, 2, 3)], (3, 4, 6))


def test_split_gives_channels_last_views_in_the_order_of_the_layout() -> None:
    flat = torch.arange(2 * LAYOUT.dim).reshape(2, LAYOUT.dim)
    eps_z, eps_x = LAYOUT.split(flat)
    assert [tuple(eps.shape) for eps in (*eps_z, eps_x)] == [(2, 2, 1, 1), (2, 2, 2, 3), (2, 3, 4, 6)]
    assert eps_x.stride() == (LAYOUT.dim, 1, 6 * 3, 3)
    # image 1, group 1 (behind 2 elements), channel 1, row 1, column 2: element 2 + (1 * 3 + 2) * 2 + 1
    assert eps_z[1][1, 1, 1, 2] == LAYOUT.dim + 2 + (1 * 3 + 2) * 2 + 1
    eps_x.zero_()
    assert (flat[:, 14:] == 0).all() and (flat[1, :14] != 0).all()


def test_join_undoes_split_for_any_memory_format() -> None:
    flat = torch.randn(3, LAYOUT.dim)
    eps_z, eps_x = LAYOUT.split(flat)
    assert torch.equal(LAYOUT.join(eps_z, eps_x), flat)
    assert torch.equal(LAYOUT.join([eps.contiguous() for eps in eps_z], eps_x.contiguous()), flat)


def test_gradients_reach_the_flat_vector_through_split() -> None:
    flat = torch.randn(2, LAYOUT.dim, requires_grad=True)
    cotangent = torch.randn(2, LAYOUT.dim)
    eps_z, eps_x = LAYOUT.split(flat)
    (gradient,) = torch.autograd.grad(LAYOUT.join(eps_z, eps_x), flat, cotangent)
    assert torch.equal(gradient, cotangent)


def test_layout_of_a_preset_has_its_published_size() -> None:
    config = PRESETS["cifar10"].nvae
    assert config.noise_layout.dim == 153_600 + 3 * 32 * 32


def test_noise_of_another_layout_is_rejected() -> None:
    with pytest.raises(ValueError, match="this layout takes"):
        LAYOUT.split(torch.zeros(2, LAYOUT.dim + 1))
    eps_z, eps_x = LAYOUT.split(torch.zeros(2, LAYOUT.dim))
    with pytest.raises(ValueError, match="this layout takes"):
        LAYOUT.join(eps_z[::-1], eps_x)
