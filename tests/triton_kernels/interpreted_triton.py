"""The Triton kernels in Triton's interpreter against their references in fp64; `test_triton.py` runs this file.

The interpreter is chosen when Triton is imported, so these tests have a process of their own. Everything that kernels
read or write lies between bands of NaN: a read outside spoils a result, a write outside a band.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from benchmarks.step.sensitive import make_sensitive
from tests.helpers.frozen_pairs import FLOAT32_ERROR
from tests.helpers.golden import relative_error
from vaebm_fast import reference
from vaebm_fast.config import EnergyConfig, NoiseLayout, NVAEConfig, parse_blocks
from vaebm_fast.models import EnergyNetwork
from vaebm_fast.ops import _backend
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample, bilinear_upsample_backward
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward
from vaebm_fast.ops.energy_epilogue import energy_epilogue, energy_epilogue_backward
from vaebm_fast.ops.energy_head import energy_head, energy_head_backward
from vaebm_fast.ops.gaussian_latent import gaussian_latent, gaussian_latent_backward
from vaebm_fast.ops.pixel_head import pixel_head, pixel_head_backward
from vaebm_fast.ops.pointwise import pack_pointwise, pointwise, pointwise_backward
from vaebm_fast.ops.se_gate_residual import se_gate_residual, se_gate_residual_backward
from vaebm_fast.reference import Activation
from vaebm_fast.triton_kernels import pointwise as pointwise_kernels
from vaebm_fast.triton_kernels import se_gate_residual as gate_kernels

BAND = 4096  # elements on either side, more than a block reaches beyond a ragged edge
# The NaN of dtypes that have none
POISON = {torch.uint8: 235, torch.bool: True, torch.int32: -123456789, torch.int64: -123456789}
OPS = torch.ops.vaebm_triton
OP_NAMES = (
    "depthwise_swish",
    "pointwise",
    "bilinear_upsample",
    "energy_epilogue",
    "energy_head",
    "se_gate_residual",
    "gaussian_latent",
    "pixel_head",
    "residual_tail",
)
PRECISIONS = [torch.float32, torch.float16]

_empty = torch.empty
_bands: list[Tensor] = []


def banded_empty(*size: Any, dtype: torch.dtype | None = None, memory_format: Any = None, **options: Any) -> Tensor:
    """torch.empty, all NaN, in the middle of a longer tensor of NaNs that is looked at after the test."""
    shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    layout = torch.contiguous_format if memory_format in (None, torch.preserve_format) else memory_format
    strides = _empty(shape, device="meta", memory_format=layout).stride()
    dtype = dtype or torch.float32
    whole = torch.full((shape.numel() + 2 * BAND,), POISON.get(dtype, torch.nan), dtype=dtype)
    _bands.extend((whole[:BAND], whole[BAND + shape.numel() :]))
    return whole.as_strided(shape, strides, BAND)


@pytest.fixture(autouse=True)
def bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What a launcher allocates is a `banded_empty`, until the patch that this gives is undone."""

    def empty_like(x: Tensor, *, memory_format: Any = None, **options: Any) -> Tensor:
        return banded_empty(x.shape, dtype=x.dtype, memory_format=memory_format)

    def new_empty(x: Tensor, *size: Any, **options: Any) -> Tensor:
        return banded_empty(*size, dtype=x.dtype)

    _bands.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", banded_empty)
        patch.setattr(torch, "empty_like", empty_like)
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield patch
    whole = ((band.isnan() | (band == POISON.get(band.dtype, torch.nan))).all() for band in _bands)
    assert all(whole), "A kernel wrote outside its result."


def normal(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normals between bands, images NHWC in memory."""
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return banded_empty(size, dtype=dtype, memory_format=layout).copy_(scale * torch.randn(size))


def promoted(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]


def assert_accurate(run: Callable[..., Any], slow: Callable[..., Any], *arguments: Any) -> None:
    """Error against fp64 at most twice the reference's in fp32, rounded to the result's precision, plus a unit there.

    The unit is of the largest number: 2^-23 of it in fp32 (sums differ in order), 2^-10 in fp16 (operands of the GEMM
    are rounded once more).
    """
    results, fp32, fp64 = (
        [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
        for out in (
            run(*arguments),
            slow(*promoted(arguments, torch.float32)),
            slow(*promoted(arguments, torch.float64)),
        )
    )
    assert len(results) == len(fp64)
    for result, rounded, exact in zip(results, fp32, fp64, strict=True):
        assert result.shape == exact.shape
        unit = 2.0**-10 if result.dtype == torch.float16 else 2.0**-23
        allowed = 2 * (rounded.to(result.dtype) - exact).abs().max() + unit * exact.abs().max()
        assert (result - exact).abs().max() <= allowed
        assert result.dim() < 4 or result.is_contiguous(memory_format=torch.channels_last)


def on_triton(face: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arguments: face(*arguments, **options, backend="triton")


def with_options(slow: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arguments: slow(*arguments, **options)


# N, C, H, W, K: one pixel; odd, several blocks of channels and strips; several chunks of rows; the widest windows
DEPTHWISE = [(1, 1, 1, 1, 5), (2, 35, 3, 9, 5), (1, 2, 35, 3, 3), (1, 3, 2, 3, 7)]


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise_swish(shape: tuple[int, ...], upsample: bool) -> None:
    check_depthwise(shape, upsample, torch.float32)


@pytest.mark.parametrize("upsample", [False, True])
def test_depthwise_swish_in_half_precision(upsample: bool) -> None:
    check_depthwise((1, 70, 4, 5, 5), upsample, torch.float16)


def test_depthwise_swish_with_the_widest_window() -> None:
    check_depthwise((1, 2, 2, 3, 11), False, torch.float32)


def check_depthwise(shape: tuple[int, ...], upsample: bool, dtype: torch.dtype) -> None:
    N, C, H, W, K = shape
    scale = 2 if upsample else 1
    h, dy = normal(N, C, H, W, dtype=dtype, scale=3), normal(N, C, scale * H, scale * W, dtype=dtype)
    weight, bias = normal(K, K, C, dtype=dtype), normal(C, dtype=dtype)
    slow_ones = reference.depthwise_swish, reference.depthwise_swish_backward
    forward, backward = (with_options(slow, upsample=upsample) for slow in slow_ones)
    assert_accurate(on_triton(depthwise_swish, upsample=upsample), forward, h, weight, bias)
    assert_accurate(on_triton(depthwise_swish_backward, upsample=upsample), backward, dy, h, weight)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 17, 33, 7, 9)], ids=str)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_pointwise(shape: tuple[int, ...], activation: Activation) -> None:
    check_pointwise(shape, activation, torch.float32)


def test_pointwise_in_half_precision_behind_an_elu() -> None:
    check_pointwise((1, 40, 20, 5, 7), "elu", torch.float16)


def test_elu_is_accurate_near_zero() -> None:
    """One channel and a weight of 1: nothing but the activation, in units of its own size."""
    x = torch.cat((-torch.logspace(-30, 1, 2001), torch.tensor([0.0, 1.0, -100.0]))).reshape(1, 1, -1, 1)
    y = pointwise(x, pack_pointwise(torch.ones(1, 1), "triton"), activation="elu", backend="triton")
    exact = torch.nn.functional.elu(x.double())
    assert ((y - exact).abs() <= 2.0**-20 * exact.abs()).all()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape_class", ["narrow", "small", "large"])
def test_every_configuration_of_pointwise(
    shape_class: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ragged blocks of everything; those of TF32 are in interpreted_tf32.py."""
    monkeypatch.setattr(pointwise_kernels, "shape_class", lambda *sizes: shape_class)
    check_pointwise((1, 70, 130, 12, 13), "swish", dtype)


def check_pointwise(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    N, Cin, Cout, H, W = shape
    x, residual, dy = (normal(N, C, H, W, dtype=dtype) for C in (Cin, Cout, Cout))
    weight, bias = normal(Cout, Cin, dtype=dtype, scale=Cin**-0.5), normal(Cout, dtype=dtype)

    def forward(x: Tensor, weight: Tensor, *addends: Tensor) -> Tensor:
        return pointwise(x, pack_pointwise(weight, "triton"), *addends, activation=activation, backend="triton")

    def backward(dy: Tensor, weight: Tensor, x: Tensor | None) -> Tensor:
        packed = pack_pointwise(weight, "triton")
        return pointwise_backward(dy, packed, x, activation=activation, backend="triton")

    slow_ones = reference.pointwise, reference.pointwise_backward
    slow, slow_backward = (with_options(slow, activation=activation) for slow in slow_ones)
    assert_accurate(forward, slow, x, weight)
    assert_accurate(forward, slow, x, weight, bias, residual)
    assert_accurate(backward, slow_backward, dy, weight, None if activation == "none" else x)


def test_pointwise_takes_blocks_that_fit_the_shape() -> None:
    assert pointwise_kernels.shape_class(2**20, 1536, 20) == "narrow"
    assert pointwise_kernels.shape_class(2**20, 20, 1536) == "small"
    assert pointwise_kernels.shape_class(1024, 6144, 1024) == "small"
    assert pointwise_kernels.shape_class(2**16, 768, 128) == "large"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 5), (1, 2, 3, 1), (2, 17, 7, 9), (2, 70, 5, 8), (1, 1, 33, 64)], ids=str
)
def test_bilinear_upsample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One pixel, row and column; ragged and several blocks of channels and of pixels."""
    N, C, H, W = shape
    assert_accurate(on_triton(bilinear_upsample), reference.bilinear_upsample, normal(*shape, dtype=dtype))
    dy = normal(N, C, 2 * H, 2 * W, dtype=dtype)
    assert_accurate(on_triton(bilinear_upsample_backward), reference.bilinear_upsample_backward, dy)


def test_bilinear_upsample_reads_any_strides() -> None:
    x, dy = normal(2, 5, 3, 4), normal(2, 5, 6, 8)
    assert torch.equal(OPS.bilinear_upsample(x.contiguous()), OPS.bilinear_upsample(x))
    assert torch.equal(OPS.bilinear_upsample_backward(dy.contiguous()), OPS.bilinear_upsample_backward(dy))


IMAGES = [(1, 1, 1, 1), (2, 17, 7, 9), (2, 70, 5, 8)]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_energy_epilogue(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, skip, du = (normal(*shape, dtype=dtype, scale=3) for _ in range(3))
    shift = normal(shape[1], dtype=dtype, scale=3)
    for addends in ((), (skip, 0.7), (None, 1.0, shift), (skip, 0.7, shift)):
        assert_accurate(on_triton(energy_epilogue), reference.energy_epilogue, y, *addends)
        backward = on_triton(energy_epilogue_backward)
        assert_accurate(backward, reference.energy_epilogue_backward, du, y, *addends)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [*IMAGES, (2, 520, 2, 3)], ids=str)
def test_energy_head(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The linear layer and the energy in float32."""
    N, C, _, _ = shape
    y, skip = (normal(*shape, dtype=dtype, scale=3) for _ in range(2))
    shift, weight, bias, denergy = normal(C, dtype=dtype, scale=3), normal(C), normal(1), normal(N)
    for addends in ((None, 1.0, None), (skip, 0.7, None), (None, 1.0, shift), (skip, 0.7, shift)):
        assert_accurate(on_triton(energy_head), reference.energy_head, y, *addends, weight, bias)
        backward = on_triton(energy_head_backward)
        assert_accurate(backward, reference.energy_head_backward, denergy, y, *addends, weight)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [((1, 1, 1, 1), 1), ((2, 17, 7, 9), 4), ((2, 70, 23, 24), 5)], ids=str)
def test_se_gate_residual(shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    N, C, H, W = shape
    s, skip, dy = (normal(*shape, dtype=dtype) for _ in range(3))
    sizes = (hidden, C), (hidden,), (C, hidden), (C,)
    weights = [normal(*size, dtype=dtype) for size in sizes]
    assert_accurate(on_triton(se_gate_residual), reference.se_gate_residual, s, skip, *weights)
    squeezed, gate = normal(N, hidden, dtype=dtype).relu(), normal(N, C, dtype=dtype).sigmoid()
    arguments = dy, s, squeezed, gate, weights[0], weights[2]
    assert_accurate(on_triton(se_gate_residual_backward), reference.se_gate_residual_backward, *arguments)


def test_se_gate_residual_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 70 channels, weights read in three tiles, the sums of nine chunks in five."""
    monkeypatch.setattr(gate_kernels, "BLOCK_OUT", 32)
    monkeypatch.setattr(gate_kernels, "WEIGHT_TILE", 4 * 8 * 32)
    monkeypatch.setattr(gate_kernels, "SUMS_TILE", 2 * 32)
    test_se_gate_residual((2, 70, 23, 24), 5, torch.float32)
    s, skip, weights = normal(2, 70, 23, 24), normal(2, 70, 23, 24), [normal(*size) for size in ((5, 70), (5,))]
    _, hidden, _ = OPS.se_gate_residual(s, skip, *weights, normal(70, 5), normal(70))
    expected = torch.relu(torch.nn.functional.linear(s.mean((2, 3)), *weights))
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_pixels_are_few_and_many_enough() -> None:
    chunks = {side: side**2 / gate_kernels.chunk_of(side**2) for side in (8, 16, 32, 64, 128, 256)}
    assert chunks == {8: 1, 16: 4, 32: 16, 64: 32, 128: 64, 256: 256}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 17, 7, 9), (2, 20, 8, 8)], ids=str)
def test_gaussian_latent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The parameters in the network's precision, noise and latents in float32."""
    N, L, H, W = shape
    eps, dz, dlog_p = normal(*shape), normal(*shape), normal(N)
    for parameters in (normal(N, 2 * L, H, W, dtype=dtype, scale=4), None):
        slow = with_options(reference.gaussian_latent, with_log_p=True)
        assert_accurate(on_triton(gaussian_latent, with_log_p=True), slow, parameters, eps, 0.7)
        z, log_p = gaussian_latent(parameters, eps, 0.7, with_log_p=False, backend="triton")
        assert log_p is None and torch.equal(z, OPS.gaussian_latent(parameters, eps, 0.7, True)[0])
        for weight in (dlog_p, None):
            arguments = dz, weight, parameters, eps, 0.7
            assert_accurate(on_triton(gaussian_latent_backward), reference.gaussian_latent_backward, *arguments)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 17, 7, 9), (2, 3, 24, 24)], ids=str)
def test_pixel_head(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The logits in the network's precision, noise and pixels in float32."""
    N, C, H, W = shape
    logits, eps_x, dx, dlog_p = normal(N, 2 * C, H, W, dtype=dtype), normal(*shape), normal(*shape), normal(N)
    logits[:, C:] -= 2  # log sigmas on both sides of the floor
    slow = with_options(reference.pixel_head, with_log_p=True)
    assert_accurate(on_triton(pixel_head, with_log_p=True), slow, logits, eps_x)
    assert pixel_head(logits, eps_x, with_log_p=False, backend="triton")[1] is None
    for weight in (dlog_p, None):
        backward = on_triton(pixel_head_backward)
        assert_accurate(backward, reference.pixel_head_backward, dx, weight, logits, eps_x)


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every op, all of which have a gradient for the first."""
    x, weight = normal(2, 5, 3, 4), normal(6, 5)
    gate = normal(3, 5), normal(3), normal(5, 3), normal(5)
    tail = normal(3, 3, 5), normal(5), weight, normal(6), normal(3, 6), normal(3), normal(6, 3), normal(6)
    return {
        "depthwise_swish": (x, normal(3, 3, 5), normal(5), True),
        "pointwise": (x, weight, weight.T, normal(6), normal(2, 6, 3, 4), "elu"),
        "bilinear_upsample": (x,),
        "energy_epilogue": (x, normal(2, 5, 3, 4), 0.5, normal(5)),
        "energy_head": (x, normal(2, 5, 3, 4), 0.5, normal(5), normal(5), normal(1)),
        "se_gate_residual": (x, normal(2, 5, 3, 4), *gate),
        "gaussian_latent": (normal(2, 10, 3, 4), x, 0.7, True),
        "pixel_head": (normal(2, 10, 3, 4), x, True),
        "residual_tail": (x, normal(2, 6, 6, 8), *tail, True),
    }


def backward_arguments(name: str, arguments: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
    """Those of the op's backward, for the cotangents of ones like the outputs that have a gradient."""
    if name == "depthwise_swish":
        h, weight, _, upsample = arguments
        return torch.ones_like(outputs), h, weight, upsample
    if name == "pointwise":
        x, _, weight_t, *_, activation = arguments
        return torch.ones_like(outputs), weight_t, x.shape[1], x, activation
    if name == "bilinear_upsample":
        return (torch.ones_like(outputs),)
    if name == "energy_epilogue":
        return torch.ones_like(outputs), *arguments
    if name == "energy_head":
        return torch.ones_like(outputs), *arguments[:-1]
    if name == "se_gate_residual":
        y, hidden, gate = outputs
        return torch.ones_like(y), arguments[0], hidden, gate, arguments[2], arguments[4]
    if name == "residual_tail":
        y, *saved = outputs
        return torch.ones_like(y), arguments[0], *saved, *arguments[2:10:2], arguments[10]
    return torch.ones_like(outputs[0]), torch.ones_like(outputs[1]), *arguments[:-1]


def differentiable(name: str, outputs: Any) -> tuple[Tensor, ...]:
    """The outputs that have a gradient."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs[:1] if name in ("se_gate_residual", "residual_tail") else outputs


@pytest.mark.parametrize("name", OP_NAMES)
def test_gradient_of_an_op_is_its_backward(name: str) -> None:
    first, *rest = calls()[name]
    outputs = getattr(OPS, name)(first.requires_grad_(), *rest)
    with_gradient = differentiable(name, outputs)
    (gradient,) = torch.autograd.grad(with_gradient, first, [torch.ones_like(output) for output in with_gradient])
    outputs = tuple(t.detach() for t in outputs) if isinstance(outputs, tuple) else outputs.detach()
    expected = getattr(OPS, f"{name}_backward")(*backward_arguments(name, (first.detach(), *rest), outputs))
    assert torch.equal(gradient, expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("name", OP_NAMES)
def test_ops_pass_opcheck(name: str, bands: pytest.MonkeyPatch) -> None:
    bands.undo()  # fake tensors are made by the real torch.empty
    first, *rest = calls()[name]
    outputs = getattr(OPS, name)(first, *rest)
    backward = getattr(OPS, f"{name}_backward").default
    torch.library.opcheck(backward, backward_arguments(name, (first, *rest), outputs))
    torch.library.opcheck(getattr(OPS, name).default, (first.requires_grad_(), *rest))


@pytest.mark.parametrize("name", OP_NAMES)
def test_a_second_derivative_is_refused(name: str) -> None:
    first, *rest = calls()[name]
    output = differentiable(name, getattr(OPS, name)(first.requires_grad_(), *rest))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
        torch.autograd.grad(gradient.square().sum(), first)


@pytest.mark.parametrize("name", OP_NAMES)
def test_an_image_has_the_same_bits_anywhere_in_a_batch(name: str) -> None:
    arguments = calls()[name]
    alone = [a[1:] if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
    together, apart = (getattr(OPS, name)(*given) for given in (arguments, alone))
    for a, b in zip(differentiable(name, together), differentiable(name, apart), strict=True):
        assert torch.equal(a[1:], b)


@pytest.mark.parametrize("name", OP_NAMES)
def test_empty_batches_are_taken(name: str) -> None:
    arguments = [a[:0] if isinstance(a, Tensor) and a.dim() == 4 else a for a in calls()[name]]
    outputs = getattr(OPS, name)(*arguments)
    assert all(output.shape[0] == 0 for output in differentiable(name, outputs))
    gradients = getattr(OPS, f"{name}_backward")(*backward_arguments(name, tuple(arguments), outputs))
    assert all(gradient.shape[0] == 0 for gradient in (gradients if isinstance(gradients, tuple) else (gradients,)))


def test_latents_and_pixels_read_views_of_the_flat_noise() -> None:
    layout = NoiseLayout([(4, 3, 5)], (3, 6, 10))
    flat = normal(2, layout.dim)
    (eps,), eps_x = layout.split(flat)
    parameters, logits = normal(2, 8, 3, 5), normal(2, 6, 6, 10)
    for op, given, noise in ((OPS.gaussian_latent, (0.7, True), eps), (OPS.pixel_head, (True,), eps_x)):
        first = parameters if noise is eps else logits
        view, copy = op(first, noise, *given), op(first, noise.contiguous(), *given)
        assert all(torch.equal(a, b) for a, b in zip(view, copy, strict=True))


def test_the_frozen_pair_runs_on_triton(bands: pytest.MonkeyPatch) -> None:
    """Every op of the pair, strung together: U and its gradients are those of the plain modules."""
    bands.undo()  # its weights and other tensors come and go too
    config = NVAEConfig(
        image_size=8, num_latent_scales=2, num_groups_per_scale=1, num_latent_per_group=2, num_channels_enc=4,
        num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1, num_cell_per_cond_enc=1,
        num_cell_per_cond_dec=1,
    )  # fmt: skip
    energy = EnergyNetwork(EnergyConfig(8, 3, 4, parse_blocks("1-1d 1-2d")))
    model = make_sensitive(vf.VAEBM(vf.NVAE(config).eval(), energy))
    layout = model.noise_layout
    eps_z, eps_x = layout.split(torch.randn(2, layout.dim))
    u, gradients = model.potential_and_grad(eps_z, eps_x, "official")
    fast = model.freeze(backend="triton")
    fast_u, fast_gradients = fast.potential_and_grad(eps_z, eps_x, "official")
    assert fast.backend == "triton"
    torch.testing.assert_close(fast_u, u, rtol=1e-5, atol=1e-5)
    for fast_gradient, gradient in zip(fast_gradients, gradients, strict=True):
        assert relative_error(fast_gradient, gradient) < FLOAT32_ERROR


def test_the_interpreter_refuses_what_it_multiplies_wrongly() -> None:
    y = normal(1, 2, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="takes float32 or float16, not torch.bfloat16"):
        energy_epilogue(y, backend="triton")
    assert torch.bfloat16 in _backend.DTYPES["triton"]
