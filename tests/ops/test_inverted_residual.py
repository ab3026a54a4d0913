"""The whole inverted residual: the reference against the layers of a model and autograd, the face, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import stand_ins
from vaebm_fast import reference
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.inverted_residual import (
    BlockWeights,
    PackedBlock,
    inverted_residual,
    inverted_residual_backward,
    pack_inverted_residual,
)

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1, 1, 1, 5), (2, 3, 4, 6, 5, 3), (1, 4, 2, 3, 9, 5)]  # N, C, H, W, hidden, K


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    N, C, H, W, hidden, K = shape
    sizes = {
        "x": (N, C, H, W),
        "expand_weight": (hidden, C),
        "expand_bias": (hidden,),
        "depthwise_weight": (K, K, hidden),
        "depthwise_bias": (hidden,),
        "project_weight": (C, hidden),
        "project_bias": (C,),
    }
    return {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}


def of_backward(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A cotangent, h2 and what else the backward takes of the arguments of the forward."""
    h2 = reference.inverted_residual(**given, with_h2=True)[1]
    assert h2 is not None
    kept = {name: tensor for name, tensor in given.items() if name not in ("depthwise_bias", "project_bias")}
    return {"ds": torch.randn_like(given["x"]), "h2": h2} | kept


def weights_of(given: dict[str, Tensor]) -> BlockWeights:
    return BlockWeights(**{name: given[name] for name in BlockWeights._fields})


def face(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor | None]:
    return inverted_residual(given["x"], weights_of(given), **options)


def backward_face(given: dict[str, Tensor], **options: Any) -> Tensor:
    """Of arguments of the forward, `ds` and `h2`."""
    return inverted_residual_backward(given["ds"], given["x"], given["h2"], weights_of(given), **options)


def plain(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The layers as a model has them."""
    h = F.silu(F.conv2d(x, w["expand_weight"][:, :, None, None], w["expand_bias"]))
    window = w["depthwise_weight"].permute(2, 0, 1)[:, None]
    h = F.silu(F.conv2d(h, window, w["depthwise_bias"], padding="same", groups=len(window)))
    return F.conv2d(h, w["project_weight"][:, :, None, None], w["project_bias"])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_layers_of_a_model(shape: tuple[int, ...]) -> None:
    w = arguments(shape)
    s, h2 = reference.inverted_residual(**w, with_h2=True)
    torch.testing.assert_close(s, plain(w["x"], w))
    assert h2 is not None
    projected = F.conv2d(F.silu(h2), w["project_weight"][:, :, None, None], w["project_bias"])
    torch.testing.assert_close(s, projected)
    assert reference.inverted_residual(**w, with_h2=False)[1] is None


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_reference(shape: tuple[int, ...]) -> None:
    w = arguments(shape)
    x = w.pop("x").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.inverted_residual(x, **w, with_h2=False)[0], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_references_backward_is_the_gradient_of_the_layers(shape: tuple[int, ...]) -> None:
    given = arguments(shape)
    w = of_backward(given)
    x = given["x"].clone().requires_grad_()
    (dx,) = torch.autograd.grad(plain(x, given), x, w["ds"])
    torch.testing.assert_close(reference.inverted_residual_backward(**w), dx)


def test_the_face_on_a_cpu_is_the_reference() -> None:
    given = arguments(SHAPES[1], torch.bfloat16)
    given["x"].requires_grad_()
    expected, _ = reference.inverted_residual(**given, with_h2=False)
    s, h2 = face(given)
    assert torch.equal(s, expected) and h2 is None and s.requires_grad
    _, h2 = face(given, with_h2=True, backend="reference")
    assert h2 is not None and h2.shape == (2, 5, 4, 6) and not h2.requires_grad
    given = arguments(SHAPES[1], torch.bfloat16)
    back = of_backward(given)
    assert torch.equal(backward_face(given | back), reference.inverted_residual_backward(**back))


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    given = arguments(SHAPES[1])
    with pytest.raises(RuntimeError, match="^inverted_residual cannot run with backend='cuda'"):
        face(given, backend="cuda")
    with pytest.raises(RuntimeError, match="^inverted_residual_backward cannot run with backend='cpp'"):
        backward_face(given | of_backward(given), backend="cpp")


def test_weights_are_packed_for_cuda_and_plain_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "why_not", lambda op, device, backend: None)  # as where there is a GPU
    given = arguments((1, 32, 4, 6, 64, 5), torch.bfloat16)
    packed = pack_inverted_residual(weights_of(given))
    given |= of_backward(given)
    with pytest.raises(ValueError, match="backend='cuda' takes weights of pack_inverted_residual; pack them"):
        face(given, backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda' takes weights of pack_inverted_residual; pack them"):
        backward_face(given, backend="cuda")
    with pytest.raises(ValueError, match="backend='reference' takes plain weights"):
        inverted_residual(given["x"], packed, backend="reference")
    with pytest.raises(ValueError, match="backend='reference' takes plain weights"):
        inverted_residual_backward(given["ds"], given["x"], given["h2"], packed, backend="reference")


@pytest.mark.parametrize("shape", [(1, 48, 4, 6, 64, 5), (1, 32, 4, 6, 48, 5), (1, 32, 4, 6, 64, 3)])
def test_what_the_cuda_kernels_do_not_take_is_not_packed(shape: tuple[int, ...]) -> None:
    _, C, _, _, hidden, K = shape
    sentence = f"take C = 32, 64 or 128, hidden a multiple of 32 and K = 5, not C = {C}, hidden = {hidden}, K = {K}"
    with pytest.raises(ValueError, match=sentence):
        pack_inverted_residual(weights_of(arguments(shape)))


@pytest.mark.parametrize("C", [32, 64, 128])
def test_packed_weights_are_those_that_were_packed(C: int) -> None:
    """As the references take them apart again; in float32, where halves are exact too."""
    given = arguments((1, C, 3, 4, 96, 5), torch.float32)
    packed = pack_inverted_residual(weights_of(given))
    s, h2 = stand_ins.inverted_residual(given["x"], *packed, True)
    expected, expected_h2 = reference.inverted_residual(**given, with_h2=True)
    assert expected_h2 is not None and torch.equal(s, expected) and torch.equal(h2, expected_h2)
    back = of_backward(given)
    dx = stand_ins.inverted_residual_backward(back["ds"], back["x"], back["h2"], packed.weight_t)
    assert torch.equal(dx, reference.inverted_residual_backward(**back))


@pytest.mark.parametrize("name", ["expand_weight", "depthwise_bias", "project_weight"])
def test_a_gradient_for_a_weight_is_refused(name: str) -> None:
    given = arguments(SHAPES[1])
    given[name].requires_grad_()
    with pytest.raises(ValueError, match="inverted_residual has no gradient for its weights; detach them"):
        face(given)


BAD = [
    ("x", torch.zeros(2, 3, 4), "x must be floating point"),
    ("expand_weight", torch.zeros(5), r"expand_weight must be \[hidden, C\]"),
    ("expand_weight", torch.zeros(5, 4), r"expand_weight must be \[5, 3\]; it is \[5, 4\]"),
    ("expand_bias", torch.zeros(5).double(), "expand_bias is torch.float64; convert it to torch.float32"),
    ("depthwise_weight", torch.zeros(3, 5, 5), r"depthwise_weight must be \[3, 3, 5\]"),
    ("depthwise_weight", torch.zeros(2, 2, 5), "The window is 2x2; it must be odd"),
    ("depthwise_weight", torch.tensor(1.0), r"depthwise_weight must be \[0, 0, 5\]"),
    ("project_weight", torch.zeros(4, 5), r"project_weight must be \[3, 5\]; it is \[4, 5\]"),
    ("project_weight", torch.zeros(3, 5, device="meta"), "project_weight is on meta; move it to cpu"),
]
BAD_FORWARD = [*BAD, ("depthwise_bias", torch.zeros(4), "depthwise_bias "), ("project_bias", torch.zeros(4), "project")]
BAD_BACKWARD = [*BAD, ("ds", torch.zeros(2, 3, 4, 5), "ds must be"), ("h2", torch.zeros(2, 4, 4, 6), "h2 must be")]


@pytest.mark.parametrize(("name", "value", "sentence"), BAD_FORWARD)
def test_bad_arguments_are_refused(name: str, value: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        face(arguments(SHAPES[1], torch.float32) | {name: value})


@pytest.mark.parametrize(("name", "value", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(name: str, value: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        given = arguments(SHAPES[1], torch.float32)
        backward_face(given | of_backward(given) | {name: value})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"weight": torch.zeros(2, 3).bfloat16()}, r"weight must be \[2, 3968\]; it is \[2, 3\]"),
        ({"weight_t": torch.zeros(1, 4992).bfloat16()}, r"weight_t must be \[2, 4992\]"),
        ({"project_bias": torch.zeros(32)}, "project_bias is torch.float32; convert it to torch.bfloat16"),
    ],
)
def test_bad_packed_weights_are_refused(changed: dict[str, Tensor], sentence: str) -> None:
    given = arguments((1, 32, 4, 6, 64, 5), torch.bfloat16)
    packed = pack_inverted_residual(weights_of(given))._replace(**changed)
    with pytest.raises(ValueError, match=sentence):
        inverted_residual(given["x"], packed)


def test_packed_weights_are_for_bfloat16(compiled: None) -> None:
    given = arguments((1, 32, 4, 6, 64, 5), torch.float32)
    with pytest.raises(ValueError, match="take bfloat16 and C = 32, 64 or 128, not torch.float32 and C = 32"):
        inverted_residual(given["x"], pack_inverted_residual(weights_of(given)))


def on_meta(shape: tuple[int, ...]) -> tuple[Tensor, PackedBlock]:
    given = arguments(shape, torch.bfloat16)
    packed = pack_inverted_residual(weights_of(given))
    return given["x"].to("meta").requires_grad_(), PackedBlock(*(tensor.to("meta") for tensor in packed))


def test_the_fakes_of_the_cpp_ops_have_the_shapes_of_the_reference(compiled: None) -> None:
    x, packed = on_meta((2, 32, 4, 6, 64, 5))
    s, h2 = torch.ops.vaebm_fast.inverted_residual(x, *packed, True)
    assert s.shape == x.shape and h2.shape == (2, 64, 4, 6) and s.dtype == h2.dtype == torch.bfloat16
    assert s.is_contiguous(memory_format=torch.channels_last) and h2.is_contiguous(memory_format=torch.channels_last)
    assert s.requires_grad and not h2.requires_grad
    (dx,) = torch.autograd.grad(s, x, torch.empty_like(s))
    assert dx.shape == x.shape and dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.ops.vaebm_fast.inverted_residual(x.detach(), *packed, False)[1].shape == (0,)


def test_the_cpp_op_refuses_gradients_that_it_does_not_have(compiled: None) -> None:
    x, packed = on_meta((1, 32, 4, 6, 64, 5))

    def gradient(with_h2: bool) -> Tensor:
        s, _ = torch.ops.vaebm_fast.inverted_residual(x, *packed, with_h2)
        return torch.autograd.grad(s, x, torch.empty_like(s), create_graph=True)[0]

    with pytest.raises(RuntimeError, match="call it with with_h2=True"):
        gradient(with_h2=False)
    with pytest.raises(RuntimeError, match="no gradient for its weights"):
        bias = x.new_empty(32).requires_grad_()
        s, _ = torch.ops.vaebm_fast.inverted_residual(x, *packed._replace(project_bias=bias), True)
        s.backward(torch.empty_like(s))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient(with_h2=True).sum(), x)


def test_there_is_no_kernel_for_a_cpu() -> None:
    reason = why_not("inverted_residual", CPU, "cpp")
    assert reason == "inverted_residual has no such implementation; it has reference, cuda"
