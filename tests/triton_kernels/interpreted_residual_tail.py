"""residual_tail in Triton's interpreter: its kernels' joints, and the cells that run it. `test_triton.py` runs this."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import tune
from tests.helpers.builders import generic
from tests.triton_kernels.interpreted_triton import (
    OPS,
    PRECISIONS,
    assert_accurate,
    bands,
    normal,
    on_triton,
    with_options,
)
from vaebm_fast import reference
from vaebm_fast.frozen import units
from vaebm_fast.frozen.cells import freeze_cell
from vaebm_fast.models.layers import Cell
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.residual_tail import residual_tail, residual_tail_backward
from vaebm_fast.triton_kernels import pointwise as pointwise_kernels
from vaebm_fast.triton_kernels import residual_tail as kernels

__all__ = ["bands"]  # the fixture that every test here runs in

# N, hidden, C, H, W, K, upsample: one pixel; a block of 64 pixels that would reach into the next image; several ragged
# blocks of everything; few pixels of many images; both ways to upsample
SHAPES = [
    (1, 1, 1, 1, 1, 5, False),
    (2, 35, 17, 7, 9, 5, False),
    (2, 20, 70, 12, 13, 3, False),
    (5, 9, 33, 2, 2, 3, False),
    (2, 9, 33, 3, 5, 5, True),
    (2, 9, 8, 6, 7, 3, True),
]


def tail(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of the op; the mean of s is not near zero, where rounding would be all that the gate sees."""
    N, hidden, C, H, W, K, upsample = shape
    scale, squeezed = 2 if upsample else 1, max(C // 4, 1)
    h, skip = normal(N, hidden, H, W, dtype=dtype), normal(N, C, scale * H, scale * W, dtype=dtype)
    depthwise = normal(K, K, hidden, dtype=dtype, scale=1 / K), normal(hidden, dtype=dtype)
    project = normal(C, hidden, dtype=dtype, scale=hidden**-0.5), normal(C, dtype=dtype)
    first = normal(squeezed, C, dtype=dtype, scale=C**-0.5), normal(squeezed, dtype=dtype)
    return h, skip, *depthwise, *project, *first, normal(C, squeezed, dtype=dtype), normal(C, dtype=dtype)


def saved(shape: tuple[Any, ...], arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of the backward: cotangent and what the forward saves, all of them random."""
    h, skip, depthwise, _, project, _, first, _, second, _ = arguments
    (N, C, H, W), hidden = skip.shape, h.shape[1]
    dy, s, h2 = normal(*skip.shape, dtype=dtype), normal(*skip.shape, dtype=dtype), normal(N, hidden, H, W, dtype=dtype)
    squeezed, gate = normal(N, first.shape[0], dtype=dtype).relu(), normal(N, C, dtype=dtype).sigmoid()
    return dy, h, h2, s, squeezed, gate, depthwise, project, first, second


def check(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    arguments, upsample = tail(shape, dtype), shape[-1]
    slow = with_options(reference.residual_tail, upsample=upsample)
    assert_accurate(on_triton(residual_tail, upsample=upsample), slow, *arguments)
    backward = with_options(reference.residual_tail_backward, upsample=upsample)
    given = saved(shape, arguments, dtype)
    assert_accurate(on_triton(residual_tail_backward, upsample=upsample), backward, *given)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_tail(shape: tuple[Any, ...]) -> None:
    check(shape, torch.float32)


def test_residual_tail_in_half_precision() -> None:
    check((2, 9, 33, 3, 5, 5, True), torch.float16)


@pytest.mark.parametrize("shape_class", ["narrow", "small", "large"])
def test_every_shape_class(shape_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of several ragged blocks: sums of blocks, and the gate where the gradient of the projection is."""
    monkeypatch.setattr(pointwise_kernels, "shape_class", lambda *sizes: shape_class)
    check((2, 20, 70, 12, 13, 1, False), torch.float16)


@pytest.mark.parametrize(
    ("shape", "dtype"), list(zip((SHAPES[1], SHAPES[4]), reversed(PRECISIONS), strict=True)), ids=str
)
def test_storing_the_activated_tensor_changes_no_bit(
    shape: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, results = tail(shape, dtype), []
    for stores in (False, True):
        monkeypatch.setattr(kernels, "stores_activated", lambda C, dtype, stores=stores: stores)
        results.append(OPS.residual_tail(*arguments, shape[-1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_table_answers_for_every_width() -> None:
    assert not kernels.stores_activated(64, torch.bfloat16) and not kernels.stores_activated(256, torch.bfloat16)
    assert kernels.stores_activated(257, torch.bfloat16) and kernels.stores_activated(4096, torch.bfloat16)


def test_what_is_saved_is_what_the_parts_compute() -> None:
    """h2, s, hidden and gate of the op are those that its backward takes."""
    shape = SHAPES[1]
    h, skip, depthwise, depthwise_bias, project, project_bias, *gate_weights = tail(shape, torch.float32)
    results = OPS.residual_tail(h, skip, depthwise, depthwise_bias, project, project_bias, *gate_weights, False)
    h2 = reference.depthwise_swish(h, depthwise, depthwise_bias)
    s = reference.pointwise(h2, project, project_bias, activation="swish")
    hidden = torch.relu(torch.nn.functional.linear(s.mean((2, 3)), *gate_weights[:2]))
    gate = torch.sigmoid(torch.nn.functional.linear(hidden, *gate_weights[2:]))
    for result, expected in zip(results[1:], (h2, s, hidden, gate), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_se", [True, False])
@pytest.mark.parametrize("resample", ["none", "up"])
def test_a_frozen_cell_runs_the_op_where_it_has_a_gate(resample: str, use_se: bool, bands: pytest.MonkeyPatch) -> None:
    """Value and gradient of the cell itself, in fp64."""
    bands.undo()  # its weights and other tensors come and go too
    cell = generic(Cell(["mconv_e3k5g0"], 8, 8, resample=resample, use_se=use_se))
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(cell(x))
    (dx,) = torch.autograd.grad(cell(x), x, dy)
    ran: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        run = units.residual_tail
        patch.setattr(units, "residual_tail", lambda *args, **kwargs: ran.append(True) or run(*args, **kwargs))
        frozen = freeze_cell("cell", cell, torch.float32, OpBackends.of("triton"))
        x32 = x.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = frozen(x32)
    (dx32,) = torch.autograd.grad(y, x32, dy.float())
    assert ran == [True] * use_se
    torch.testing.assert_close(y.double(), cell(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx32.double(), dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "key"),
    [("depthwise_swish", (5, True, False, 4)), ("pointwise", ("narrow", "ieee")), ("residual_tail", (8, "ieee"))],
)
def test_a_table_is_tuned_by_running_its_kernels(name: str, key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates on a small cell, timed by a clock that runs them: the one that is not in the source wins."""
    tuner = tune.TUNERS[name]
    in_source = getattr(tuner.module, tuner.table).get(key, False)
    other = next(candidate for candidate in tuner.candidates if candidate != in_source)
    monkeypatch.setattr(tuner.module, tuner.table, {key: in_source})
    monkeypatch.setattr(tune, "CELLS", ((12, 8, 3),))
    monkeypatch.setattr(tune, "PRODUCTS", {"narrow": ((12, 8, 3),)})
    monkeypatch.setattr(tune, "BATCH", 2)
    results: list[list[Tensor]] = []

    def clock(calls: tune.Calls) -> float:
        outputs = [call() for call in calls]
        results.append([t for out in outputs for t in (out if isinstance(out, tuple) else (out,))])
        return 2.0 - len(results)  # 1 ms, then none

    tune.tune(tuner._replace(candidates=(other,)), clock, torch.device("cpu"), all_precisions=True)
    assert getattr(tuner.module, tuner.table) == {key: other}
    assert len(results) == 2 and all(t.isfinite().all() for t in results[0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
