"""The tail of an inverted residual: reference against autograd, bad arguments. Kernels: interpreted_residual_tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.kernels import nhwc
from vaebm_fast import reference
from vaebm_fast.frozen import units
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.depthwise_swish import depthwise_swish
from vaebm_fast.ops.pointwise import pack_pointwise
from vaebm_fast.ops.residual_tail import residual_tail, residual_tail_backward

NAMES = (
    "h", "skip", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias", "weight_in", "bias_in",
    "weight_out", "bias_out",
)  # fmt: skip


def tensors(upsample: bool) -> dict[str, Tensor]:
    """hidden = 6, C = 4, on 3 x 5 pixels or their double."""
    scale = 2 if upsample else 1
    h, skip = nhwc(2, 6, 3, 5), nhwc(2, 4, scale * 3, scale * 5)
    sizes = ((3, 3, 6), (6,), (4, 6), (4,), (2, 4), (2,), (4, 2), (4,))
    return dict(zip(NAMES, (h, skip, *(torch.randn(size) for size in sizes)), strict=True))


def saved(given: dict[str, Tensor], upsample: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h2, s, hidden and gate."""
    h2 = depthwise_swish(
        given["h"], given["depthwise_weight"], given["depthwise_bias"], upsample=upsample, backend="reference"
    )
    s = reference.pointwise(h2, given["project_weight"], given["project_bias"], activation="swish")
    hidden = torch.relu(s.mean((2, 3)) @ given["weight_in"].T + given["bias_in"])
    return h2, s, hidden, torch.sigmoid(hidden @ given["weight_out"].T + given["bias_out"])


@pytest.mark.parametrize("upsample", [False, True])
def test_backward_of_the_reference_is_its_gradient(upsample: bool) -> None:
    given = {name: tensor.double() for name, tensor in tensors(upsample).items()}
    h, skip = (given[name].requires_grad_() for name in ("h", "skip"))
    y = residual_tail(**given, upsample=upsample, backend="reference")
    dy = torch.randn_like(y)
    dh, dskip = torch.autograd.grad(y, (h, skip), dy)
    assert torch.equal(dskip, dy)
    with torch.no_grad():
        weights = [given[name] for name in ("depthwise_weight", "project_weight", "weight_in", "weight_out")]
        arguments = (dy, h, *saved(given, upsample), *weights)
        result = residual_tail_backward(*arguments, upsample=upsample, backend="reference")
    torch.testing.assert_close(result, dh)
    assert torch.autograd.gradcheck(lambda h: residual_tail(**{**given, "h": h}, upsample=upsample), h)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_the_parts_make_the_op(has_gate: bool, upsample: bool) -> None:
    """What a backend without the op runs."""
    given = tensors(upsample)
    h, skip, depthwise, depthwise_bias, project, project_bias, *gate = given.values()
    parts = units.Depthwise(depthwise, depthwise_bias), units.Pointwise(pack_pointwise(project, "cpp"), project_bias)
    se = units.SqueezeExcite(*gate) if has_gate else None
    y = units.depthwise_project_and_add(h, skip, *parts, se, OpBackends.of("cpp"), upsample=upsample)
    _, s, *_ = saved(given, upsample)
    expected = reference.residual_tail(**given, upsample=upsample) if has_gate else skip + s
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


class Called(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_its_gradient_is_one_op() -> None:
    """On the meta device, where fakes answer: autograd fills no zeros for what is saved."""
    pytest.importorskip("triton")
    given = {name: tensor.to("meta") for name, tensor in tensors(True).items()}
    h, skip = (given[name].requires_grad_() for name in ("h", "skip"))
    y = residual_tail(**given, upsample=True, backend="triton")
    assert y.shape == skip.shape
    with Called() as called:
        dh, _ = torch.autograd.grad(y, (h, skip), torch.empty_like(y))
    assert dh.shape == h.shape
    assert [name for name in called.names if name != "aten::detach"] == [
        "aten::empty_like", "vaebm_triton::residual_tail_backward",
    ]  # fmt: skip


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not an image": ({"h": torch.ones(2, 6)}, r"h must be floating point \[N, C, H, W\]"),
    "skip of the small image": ({"skip": nhwc(2, 4, 3, 5), "upsample": True}, r"skip must be \[2, 4, 6, 10\]"),
    "even window": ({"depthwise_weight": torch.ones(2, 2, 6)}, "window is 2x2; it must be odd"),
    "window of other channels": ({"depthwise_weight": torch.ones(3, 3, 4)}, r"depthwise_weight must be \[3, 3, 6\]"),
    "projection with pixels": ({"project_weight": torch.ones(4, 6, 1, 1)}, r"project_weight must be \[C, hidden\]"),
    "projection of other channels": ({"project_weight": torch.ones(4, 5)}, r"project_weight must be \[4, 6\]"),
    "bias of other channels": ({"project_bias": torch.ones(6)}, r"project_bias must be \[4\]"),
    "gate of other channels": ({"weight_out": torch.ones(2, 4)}, r"weight_out must be \[4, 2\]"),
    "another precision": ({"weight_in": torch.ones(2, 4).double()}, "weight_in is torch.float64; convert it"),
    "a live weight": ({"project_weight": torch.ones(4, 6, requires_grad=True)}, "has no gradient for its weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_one_sentence(case: str) -> None:
    changed, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        residual_tail(**{**tensors(False), **changed})


def test_a_backward_of_other_shapes_is_refused() -> None:
    given = tensors(False)
    h2, s, hidden, gate = saved(given, False)
    weights = [given[name] for name in ("depthwise_weight", "project_weight", "weight_in", "weight_out")]
    for arguments, sentence in (
        ((s[:, :3], given["h"], h2, s, hidden, gate), r"dy must be \[2, 4, 3, 5\]"),
        ((s, given["h"], s, s, hidden, gate), r"h2 must be \[2, 6, 3, 5\]"),
        ((s, given["h"], h2, s, gate, gate), r"hidden must be \[2, 2\]"),
        ((s, given["h"], h2, s, hidden, hidden), r"gate must be \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            residual_tail_backward(*arguments, *weights)
