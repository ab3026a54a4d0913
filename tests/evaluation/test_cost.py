"""What a chain step costs: the counters on cases done by hand, and the design's budget for celeba_256."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vaebm_fast import cli
from vaebm_fast.evaluation.cost import (
    META,
    PLANS,
    CellShape,
    Cost,
    _moved,
    _without_values,
    bytes_moved,
    cost,
    least_traffic,
    step_traffic,
)
from vaebm_fast.frozen import cells, freeze
from vaebm_fast.runtime import extension


@cache
def counted(preset: str) -> Cost:
    return cost(preset)


def celeba_256() -> Cost:
    return counted("celeba_256")


def test_bytes_are_those_of_every_argument_and_result() -> None:
    x = torch.empty(2, 3, 4, 4, device=META)
    weight = torch.empty(5, 3, 1, 1, device=META)
    assert bytes_moved(lambda: F.silu(x)) == 4 * 2 * 96
    assert bytes_moved(lambda: x.add_(x)) == 4 * 3 * 96
    assert bytes_moved(lambda: F.conv2d(x, weight)) == 4 * (96 + 15 + 160)
    assert bytes_moved(lambda: x.permute(0, 2, 3, 1).flatten(0, 2)[1:].detach()) == 4 * 2 * 96  # the copy of flatten
    assert bytes_moved(lambda: x.view(2, 48)[:, 1:]) == 0
    assert bytes_moved(lambda: torch.empty(1, 3, 1, 1, device=META).expand(2, 3, 4, 4) + x) == 4 * (3 + 2 * 96)


def test_operators_are_those_that_move_memory() -> None:
    model = _without_values("digits")
    with torch.device("meta"):
        x = torch.empty(4, 3)
    counted = _moved(lambda: torch.cat([x.mul(2).view(-1), torch.empty(3, device=META), x.t().sum().reshape(1)]))
    assert counted.operators == 3, "mul, sum and cat"
    plain, frozen = step_traffic(model).operators, step_traffic(freeze(model, backend="reference")).operators
    assert plain > frozen > 100


@pytest.mark.parametrize("preset", ["celeba_64"])
def test_the_documented_numbers_of_operators_are_those_counted(preset: str) -> None:
    if not extension.is_available():
        pytest.skip("compiled pairs need the compiled part")
    document = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for name, moved in counted(preset).traffic.items():
        assert re.search(rf"^\| {name} \| {moved.operators} \|", document, re.MULTILINE), name


def test_what_the_kernels_of_one_op_hand_each_other_is_moved_too() -> None:
    """h 5 channels of 4x4 pixels, y 3: h2 and s are written and read; dy is read twice, dh2 written and read."""
    h, skip = (torch.empty(2, C, 4, 4, device=META) for C in (5, 3))
    sizes = ((3, 3, 5), (5,), (3, 5), (3,), (2, 3), (2,), (3, 2), (3,))
    weights = [torch.empty(size, device=META) for size in sizes]
    h2, s, read, gate = 2 * 80, 2 * 48, sum(w.numel() for w in weights), 2 * (2 + 3)
    forward = partial(torch.ops.vaebm_triton.residual_tail, h, skip, *weights, False)
    assert bytes_moved(forward) == 4 * (h2 + 2 * h2 + 2 * s + 2 * s + read + gate)  # h, h2, s, skip and y
    _, *saved = forward()
    backward = partial(torch.ops.vaebm_triton.residual_tail_backward, skip, h, *saved, *weights[::2], False)
    read = sum(w.numel() for w in weights[::2])
    assert bytes_moved(backward) == 4 * (2 * s + s + h2 + 2 * h2 + 2 * h2 + read + gate)  # dy, s, h2, dh2, h and dh


def test_a_convolutions_backward_reads_no_input() -> None:
    x = torch.empty(2, 3, 4, 4, device=META, requires_grad=True)
    weight, dy = torch.empty(5, 3, 1, 1, device=META), torch.empty(2, 5, 4, 4, device=META)
    y = F.conv2d(x, weight)
    assert bytes_moved(lambda: torch.autograd.grad(y, x, dy)) == 4 * (160 + 15 + 96)


def test_flops_of_celeba_256_are_the_designs() -> None:
    """251.5 GFLOP as written; the design's 209.8 after the rewrites counted one step differently: 209.5."""
    celeba = celeba_256()
    assert celeba.plain_flops == pytest.approx(251.5e9, rel=1e-3)
    assert celeba.frozen_flops == pytest.approx(209.8e9, rel=2e-3)


def test_the_cells_of_celeba_256_are_the_designs() -> None:
    cells = celeba_256().cells
    wide = [cell for cell in cells if cell.side >= 64]
    assert (len(cells), len(wide)) == (44, 20)
    assert sum(cell.h2 for cell in cells) == pytest.approx(139e6, rel=5e-3)
    assert sum(cell.h2 for cell in wide) == pytest.approx(113e6, rel=5e-3)
    assert sum(cell.weights for cell in wide) == pytest.approx(3e6, rel=0.06)


def test_the_plans_of_celeba_256_differ_from_the_designs_by_one_constant() -> None:
    """The design's 2.1, 1.24 and 0.68 GB fuse the energy network and the heads too, in 0.30 GB that it does not list.

    Here they are counted as they run today. The inverted residuals alone agree to the digits that the design gives.
    """
    celeba = celeba_256()
    gigabytes = [(plan.per_image - celeba.rest_bytes) / 1e9 for plan in celeba.plans.values()]
    for ours, design, digit in zip(gigabytes, (2.1, 1.24, 0.68), (0.05, 0.005, 0.005), strict=True):
        assert ours + 0.298 == pytest.approx(design, abs=digit)
    assert celeba.rest_bytes > 0.298e9


def test_the_plain_modules_of_celeba_256_move_less_than_the_research_code() -> None:
    """38.3 GB in the design's table: there a swish is several kernels each way and its weights ask for gradients."""
    plain = celeba_256().traffic["plain modules, float32"]
    assert 20e9 < plain.per_image + plain.per_step < 38.3e9


def test_each_rewrite_of_the_pair_moves_less() -> None:
    traffic = counted("digits").traffic
    plain, reference = traffic["plain modules, float32"], traffic["frozen, reference, float32"]
    assert reference.per_image < plain.per_image and reference.per_step < plain.per_step
    assert traffic["frozen, reference, bfloat16"].per_image < 0.6 * reference.per_image
    if extension.is_available():
        assert traffic["frozen, cpp, float32"].per_image < reference.per_image
        assert traffic["frozen, triton, bfloat16"].per_image < traffic["frozen, reference, bfloat16"].per_image


def test_whole_blocks_save_the_traffic_of_the_kernels_that_they_replace(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those move h1 and h2 three times each, swish(h2) twice, and the gradient of each of the three twice.

    A whole block writes and reads h2 once, and reads x once more.
    """
    celeba = celeba_256()
    fused = [c for c in celeba.cells if c.side >= cells.FUSED_SIDE and not c.is_upsampled]
    assert len(fused) == 9 and {c.in_channels for c in fused} == {32, 64}
    monkeypatch.setattr(cells, "FUSED_SIDE", 512)  # beyond the image: none
    apart = step_traffic(freeze(_without_values("celeba_256"), torch.bfloat16, "cuda"))
    whole = celeba.traffic["frozen, cuda, bfloat16"]
    assert apart.per_image - whole.per_image == 2 * sum(12 * c.h2 - c.x for c in fused)


def test_a_compiled_pair_reads_its_weights_once_each_way(compiled: None) -> None:
    """As every plan does; all but biases, which have no part backward.

    A whole block reads more for 32 hidden channels: backward the first weight twice, and each way 1920 numbers, as
    float32 and with gaps, where taps and biases are 27 * 32.
    """
    celeba = celeba_256()
    both_ways = next(iter(celeba.plans.values())).per_step
    fused = [c for c in celeba.cells if c.side >= cells.FUSED_SIDE and not c.is_upsampled]
    more = 2 * sum(c.hidden // 32 * (32 * c.in_channels + 2 * (1920 - 27 * 32)) for c in fused)
    for backend, packed in (("triton", 0), ("cuda", more)):
        read = celeba.traffic[f"frozen, {backend}, bfloat16"].per_step - packed
        assert 0.99 * both_ways < read <= both_ways


def test_plans_of_a_cell_by_hand() -> None:
    """Upsampled, 4x4 with 2 channels to 8x8 with 3: x 32, h1 80, h2 320, y 192; 3 of 5 taps a row are left."""
    cell = CellShape(in_channels=2, hidden=5, out_channels=3, side=8, window=5, is_upsampled=True, weights=0)
    assert (cell.x, cell.h1, cell.h2, cell.y) == (32, 80, 320, 192)
    assert cell.depthwise_flops == 2 * 2 * 9 * 320
    assert [plan(cell) for plan in PLANS.values()] == [3 * 32 + 960 + 320 + 640, 4 * 32 + 960 + 640, 4 * 32 + 960]


def test_floors_are_work_over_peak_rate() -> None:
    floors = celeba_256().floors_ms("H200")
    assert floors["CUDA cores in float32, depthwise"] == pytest.approx(11.6 / 67, rel=1e-3)  # GFLOP / TFLOP/s
    assert floors["tensor cores, all except depthwise"] == pytest.approx((209.5 - 11.6) / 989, rel=1e-3)
    moved = celeba_256().plans["one kernel, all recomputed"].per_image
    assert floors["memory, one kernel, all recomputed"] == pytest.approx(moved / 4.8e9)


def test_the_command_prints_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--preset", "digits"]) == 0
    out, digits = capsys.readouterr().out, counted("digits")
    assert f"{digits.noise_dim:,} elements" in out and "H200" in out
    for name in (*digits.traffic, *digits.plans):
        assert name in out


def test_an_unknown_preset_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--preset", "celeba_512"]) == 1
    assert capsys.readouterr().err.startswith("error: Preset 'celeba_512' is not known; it must be one of cifar10,")


def test_the_least_traffic_is_that_of_the_leanest_plan() -> None:
    plans, least = counted("digits").plans, least_traffic("digits")
    assert least == min(plans.values(), key=lambda plan: plan.per_image)
    assert least.per_image < max(plan.per_image for plan in plans.values())
