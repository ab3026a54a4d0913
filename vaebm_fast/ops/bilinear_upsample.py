"""Bilinear upsampling by 2 with aligned corners, and its gradient.

PyTorch's CUDA gradient uses atomics in the tensor's own precision, so its bits differ from run to run. This one gathers
in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_image, choose_for


def bilinear_upsample(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """y[i, j] = sum_hw t(i, h) t(j, w) x[h, w], t(i, h) = max(0, 1 - |i (H - 1) / (2H - 1) - h|), t(j, w) with W.

    x: [N, C, H, W], best in channels_last (Triton copies other layouts). Weights and sums are float32 (float64 for
    float64), rounded once. Returns y [N, C, 2H, 2W] in x's layout; from Triton, channels_last.
    Moves each element of x and y once.
    Differentiable once (`reference`: any number of times); saves nothing. The gradient sums in a fixed order.
    Raises ValueError for an invalid x, RuntimeError for a missing backend.
    """
    check_image("x", x)
    if choose_for("bilinear_upsample", backend, x) == "reference":
        return reference.bilinear_upsample(x)
    y: Tensor = torch.ops.vaebm_triton.bilinear_upsample(x)
    return y


def bilinear_upsample_backward(dy: Tensor, *, backend: Backend = "auto") -> Tensor:
    """dx[h, w] = sum_ij t(i, h) t(j, w) dy[i, j]: the gradient for x of `bilinear_upsample`.

    dy: [N, C, 2H, 2W]; dtypes and layouts as there. A pixel has four taps per dimension, i = 2h - 1 .. 2h + 2.
    Returns dx [N, C, H, W].
    Moves each element of dy and dx once.
    """
    check_image("dy", dy)
    if dy.shape[2] % 2 or dy.shape[3] % 2:
        raise ValueError(f"dy must be [N, C, 2H, 2W]; it is {list(dy.shape)}.")
    if choose_for("bilinear_upsample_backward", backend, dy) == "reference":
        return reference.bilinear_upsample_backward(dy)
    dx: Tensor = torch.ops.vaebm_triton.bilinear_upsample_backward(dy)
    return dx


def _fake(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    return _register.like(x, N, C, 2 * H, 2 * W)


def _fake_backward(dy: Tensor) -> Tensor:
    N, C, H, W = dy.shape
    return _register.like(dy, N, C, H // 2, W // 2)


_register.define("bilinear_upsample(Tensor x) -> Tensor", _fake)
_register.define("bilinear_upsample_backward(Tensor dy) -> Tensor", _fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass  # the gradient depends only on dy


def _backward(ops: Any, ctx: Any, dy: Tensor) -> Tensor:
    dx: Tensor = ops.bilinear_upsample_backward(dy)
    return dx


_register.register_gradient("bilinear_upsample", save=_save, backward=_backward)
