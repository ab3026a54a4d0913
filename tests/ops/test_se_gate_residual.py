"""skip + gate(s) s: the reference against autograd, the kernels against it in fp64, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.kernels import (
    assert_as_accurate,
    assert_never_falls_back,
    assert_refused,
    assert_same_bits_for_any_number_of_threads,
    nhwc,
    strided,
)
from vaebm_fast import reference
from vaebm_fast.ops.se_gate_residual import se_gate_residual, se_gate_residual_backward

# N, C, H, W, hidden: one; odd; a hidden layer wider than a vector and its tail; several chunks; a cell of a model
SHAPES = [(1, 1, 1, 1, 1), (2, 17, 7, 9, 5), (3, 40, 3, 5, 37), (1, 12, 41, 13, 4), (2, 128, 32, 32, 8)]


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """s, skip, the four weights and a cotangent, float32. The mean of s is 1: a sum that cancels would hide errors."""
    N, C, H, W, width = shape
    weights = (torch.randn(width, C) / C**0.5, torch.randn(width), torch.randn(C, width), torch.randn(C))
    return nhwc(N, C, H, W) + 1, nhwc(N, C, H, W), weights, nhwc(N, C, H, W)


def layers(s: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden] and gate [N, C] as a model computes them."""
    hidden = F.relu(F.linear(s.mean((2, 3)), *weights[:2]))
    return hidden, torch.sigmoid(F.linear(hidden, *weights[2:]))


def plain(s: Tensor, skip: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    return skip + s * layers(s, weights)[1][:, :, None, None]


def plain_backward(dy: Tensor, s: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    s = s.detach().requires_grad_()
    return torch.autograd.grad(plain(s, torch.zeros_like(s), weights), s, dy)[0]


def double(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(weight.double() for weight in weights)


def backward_of(run: Any, dy: Tensor, s: Tensor, weights: tuple[Tensor, ...], **options: Any) -> Tensor:
    return run(dy, s, *layers(s, weights), weights[0], weights[2], **options)


def test_reference_equals_plain_pytorch_and_its_gradient() -> None:
    s, skip, weights, dy = tensors((2, 5, 3, 4, 3))
    s, skip, dy, weights = s.double(), skip.double(), dy.double(), double(weights)
    torch.testing.assert_close(reference.se_gate_residual(s, skip, *weights), plain(s, skip, weights))
    ds = backward_of(reference.se_gate_residual_backward, dy, s, weights)
    torch.testing.assert_close(ds, plain_backward(dy, s, weights))


def test_reference_passes_gradcheck() -> None:
    s, skip, weights, dy = tensors((1, 3, 2, 3, 2))
    weights, dy = double(weights), dy.double()
    inputs = (s.double().requires_grad_(), skip.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda s, skip: reference.se_gate_residual(s, skip, *weights), inputs)
    back = reference.se_gate_residual_backward
    assert torch.autograd.gradcheck(lambda s: backward_of(back, dy, s, weights), inputs[0])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], compiled: None, poisoned_memory: None
) -> None:
    s, skip, weights, dy = tensors(shape)
    y = se_gate_residual(s, skip, *weights, backend="cpp")
    ds = backward_of(se_gate_residual_backward, dy, s, weights, backend="cpp")
    assert_as_accurate(y, plain(s, skip, weights), plain(s.double(), skip.double(), double(weights)))
    truth = plain_backward(dy.double(), s.double(), double(weights))
    assert_as_accurate(ds, plain_backward(dy, s, weights), truth)
    for result in (y, ds):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 63, 4096, 128 * 128])
def test_kernel_means_err_no_more_than_those_of_torch(size: int, compiled: None) -> None:
    """Seen in hidden = relu(mean), and in ds where neither gate nor dy is left beside the gradient of the mean."""
    s = nhwc(1, 32, size, 1) + 3
    identity, zero = torch.eye(32), torch.zeros(32)
    hidden = torch.ops.vaebm_fast.se_gate_residual(s, s, identity, zero, identity, zero)[1]
    assert_as_accurate(hidden, s.mean((2, 3)), s.double().mean((2, 3)))
    dy, gate = nhwc(1, 32, size, 1) + 2, torch.full((1, 32), 0.5)
    ds = se_gate_residual_backward(dy, s, torch.ones(1, 32), gate, identity, identity, backend="cpp")
    arguments = [t.double() for t in (dy, s, torch.ones(1, 32), gate, identity, identity)]
    torch.testing.assert_close(ds.double(), reference.se_gate_residual_backward(*arguments), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3, 2), (2, 0, 3, 3, 2), (2, 4, 0, 3, 2)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    s, skip, weights, dy = tensors((shape[0], 4, *shape[2:]))
    if shape[1] == 0:
        s, skip, dy = s[:, :0], skip[:, :0], dy[:, :0]
        weights = (weights[0][:, :0], weights[1], weights[2][:0], weights[3][:0])
    assert se_gate_residual(s, skip, *weights, backend="cpp").shape == s.shape
    ds = backward_of(se_gate_residual_backward, dy, s, weights, backend="cpp")
    assert ds.shape == s.shape


def test_kernels_keep_nan_in_its_image_and_channels(compiled: None) -> None:
    s, skip, weights, _ = tensors((3, 8, 4, 4, 4))
    s[1, 2, 0, 0] = torch.nan
    y = se_gate_residual(s, skip, *weights, backend="cpp")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_kernels_have_the_same_bits_for_any_number_of_threads_and_place_in_the_batch(compiled: None) -> None:
    s, skip, weights, dy = tensors((4, 19, 40, 21, 6))
    hidden, gate = layers(s, weights)

    def run() -> list[Tensor]:
        results = [se_gate_residual(s, skip, *weights, backend="cpp")]
        results.append(se_gate_residual_backward(dy, s, hidden, gate, weights[0], weights[2], backend="cpp"))
        alone = slice(2, 3)
        y = se_gate_residual(s[alone], skip[alone], *weights, backend="cpp")
        assert torch.equal(y, results[0][alone])
        part = [t[alone] for t in (dy, s, hidden, gate)]
        ds = se_gate_residual_backward(*part, weights[0], weights[2], backend="cpp")
        assert torch.equal(ds, results[1][alone])
        return results

    assert_same_bits_for_any_number_of_threads(run)


def test_kernels_read_any_strides(compiled: None) -> None:
    s, skip, weights, dy = tensors((2, 10, 6, 7, 4))
    y = se_gate_residual(s, skip, *weights, backend="cpp")
    assert torch.equal(se_gate_residual(strided(s), skip.contiguous(), *map(strided, weights), backend="cpp"), y)
    saved = layers(s, weights)
    ds = se_gate_residual_backward(dy, s, *saved, weights[0], weights[2], backend="cpp")
    others = [strided(t) for t in (dy, s, *saved, weights[0], weights[2])]
    assert torch.equal(se_gate_residual_backward(*others, backend="cpp"), ds)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_the_op_are_those_of_plain_pytorch(backend: Any, compiled: None) -> None:
    s, skip, weights, dy = tensors((2, 5, 4, 6, 3))
    inputs = (s.requires_grad_(), skip.requires_grad_())
    ds, dskip = torch.autograd.grad(se_gate_residual(s, skip, *weights, backend=backend), inputs, dy)
    torch.testing.assert_close(ds, plain_backward(dy, s, weights))
    assert torch.equal(dskip, dy)


def test_cpp_ops_pass_opcheck(compiled: None) -> None:
    s, skip, weights, dy = tensors((2, 5, 4, 6, 3))
    ops = torch.ops.vaebm_fast
    arguments = (dy, s, *layers(s, weights), weights[0], weights[2])
    torch.library.opcheck(ops.se_gate_residual_backward.default, arguments)
    torch.library.opcheck(ops.se_gate_residual.default, (s.contiguous(), skip, *weights))
    torch.library.opcheck(ops.se_gate_residual.default, (s.requires_grad_(), skip.requires_grad_(), *weights))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    s, skip, weights, dy = tensors((1, 2, 3, 3, 2))
    y = se_gate_residual(s.requires_grad_(), skip, *weights, backend="cpp")
    (ds,) = torch.autograd.grad(y, s, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="se_gate_residual is differentiable once"):
        torch.autograd.grad(ds.square().sum(), s)


def test_a_gradient_for_a_weight_is_refused(compiled: None) -> None:
    s, skip, weights, _ = tensors((1, 2, 3, 3, 2))
    for weight in weights:
        weight.requires_grad_()
        for backend in ("reference", "cpp"):
            with pytest.raises(ValueError, match="se_gate_residual has no gradient for its weights"):
                se_gate_residual(s, skip, *weights, backend=backend)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="se_gate_residual has no gradient for its weights"):
            torch.ops.vaebm_fast.se_gate_residual(s, skip, *weights)[0].square().sum().backward()
        weight.requires_grad_(False)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    s, skip, weights, dy = tensors((1, 2, 3, 3, 2))
    op = "se_gate_residual"
    assert_never_falls_back(monkeypatch, op, lambda: se_gate_residual(s, skip, *weights, backend="cpp"))
    run = se_gate_residual_backward
    assert_never_falls_back(monkeypatch, f"{op}_backward", lambda: backward_of(run, dy, s, weights, backend="cpp"))


GIVEN = {
    "s": torch.zeros(1, 4, 3, 5),
    "skip": torch.zeros(1, 4, 3, 5),
    "weight_in": torch.zeros(2, 4),
    "bias_in": torch.zeros(2),
    "weight_out": torch.zeros(4, 2),
    "bias_out": torch.zeros(4),
    "dy": torch.zeros(1, 4, 3, 5),
    "hidden": torch.zeros(1, 2),
    "gate": torch.zeros(1, 4),
}
FORWARD = ("s", "skip", "weight_in", "bias_in", "weight_out", "bias_out")
BACKWARD = ("dy", "s", "hidden", "gate", "weight_in", "weight_out")
BAD = [
    ({"s": torch.zeros(2, 3, 4)}, "s must be float"),
    ({"skip": torch.zeros(1, 4, 3, 6)}, r"skip must be .*\[1, 4, 3, 5\]; it is "),
    ({"weight_in": torch.zeros(2, 4, 1)}, r"weight_in must be \[hidden, C\]; it is \[2, 4, 1\]"),
    ({"weight_in": torch.zeros(2, 5)}, r"weight_in must be .*\[2, 4\]; it is "),
    ({"bias_in": torch.zeros(3)}, r"bias_in must be .*\[2\]; it is "),
    ({"weight_out": torch.zeros(2, 4)}, r"weight_out must be .*\[4, 2\]; it is "),
    ({"bias_out": torch.zeros(4).double()}, "bias_out "),
    ({"dy": torch.zeros(1, 4, 3, 1)}, r"dy must be .*\[1, 4, 3, 5\]; it is "),
    ({"hidden": torch.zeros(1, 3)}, r"hidden must be .*\[1, 2\]; it is "),
    ({"gate": torch.zeros(1, 4, device="meta")}, "gate is on meta; move it to cpu"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    (name,) = change
    ops, given = torch.ops.vaebm_fast, GIVEN | change
    if name in FORWARD:
        assert_refused(se_gate_residual, ops.se_gate_residual, {k: given[k] for k in FORWARD}, sentence)
    if name in BACKWARD:
        assert_refused(
            se_gate_residual_backward, ops.se_gate_residual_backward, {k: given[k] for k in BACKWARD}, sentence
        )


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    s, skip, weights, _ = tensors((1, 2, 3, 3, 2))
    s, skip, weights = s.double(), skip.double(), double(weights)
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            se_gate_residual(s, skip, *weights, backend=backend)  # type: ignore[arg-type]
    assert se_gate_residual(s, skip, *weights, backend="reference").dtype == torch.float64
