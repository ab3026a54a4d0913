"""The emulated precisions are what they claim: every operand rounded, every sum in float32, nothing else touched."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import precision, rounding
from benchmarks.rounding import PRODUCTS, TF32Products, round_to_tf32
from tests.helpers.golden import case_path
from vaebm_fast.frozen import freeze


@pytest.mark.parametrize("truncate", [False, True])
def test_tf32_keeps_ten_bits_of_every_mantissa(truncate: bool) -> None:
    """Against exact arithmetic on integers: all that is dropped, ties, carries into the exponent, subnormals."""
    dropped = torch.arange(1 << 13)
    kept = torch.tensor([0, 1, 2, 511, 1022, 1023]) << 13
    exponents = torch.tensor([0, 1, 100, 127, 128, 253]) << 23
    bits = (exponents[:, None, None] | kept[:, None] | dropped).flatten()
    truth = ((bits if truncate else bits + (1 << 12)) >> 13) << 13
    x = bits.to(torch.int32).view(torch.float32)
    for sign in (1, -1):
        assert torch.equal(round_to_tf32(sign * x, truncate=truncate).view(torch.int32) & 0x7FFFFFFF, truth.int())
        assert torch.equal(round_to_tf32(sign * x, truncate=truncate).signbit(), (sign * x).signbit())


def test_tf32_rounds_to_the_nearest_and_leaves_what_is_not_finite() -> None:
    ulp = 2.0**-10
    x = torch.tensor([1 + ulp / 2, 1 + 0.49 * ulp, -1 - ulp / 2, 3.0, math.inf, -math.inf, math.nan])
    rounded = round_to_tf32(x).tolist()
    assert rounded[:6] == [1 + ulp, 1.0, -1 - ulp, 3.0, math.inf, -math.inf] and math.isnan(rounded[6])
    assert round_to_tf32(x, truncate=True).tolist()[:3] == [1.0, 1.0, -1.0]
    nhwc = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert round_to_tf32(nhwc).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "depthwise convolution"])
def test_operands_are_rounded_forward_and_backward_and_nothing_else(name: str) -> None:
    function, *shapes = PRODUCTS[name]
    x, weight = (torch.randn(shape) for shape in shapes)
    x.requires_grad_()
    with TF32Products() as mode:
        y = function(x, weight)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
    x64 = round_to_tf32(x.detach()).double().requires_grad_()
    y64 = function(x64, round_to_tf32(weight).double())
    (dx64,) = torch.autograd.grad(y64, x64, round_to_tf32(dy).double())
    assert mode.rounded.total() == 2
    for found, truth in ((y, y64), (dx, dx64)):
        assert precision.relative_error(found.detach().double(), truth.detach()) < 1e-6  # unrounded operands: 2e-4
    assert not torch.equal(round_to_tf32(y.detach()), y)  # the result itself keeps float32


def test_depthwise_convolutions_and_other_dtypes_are_left_alone() -> None:
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3)
    with TF32Products() as mode:
        y = F.conv2d(x, weight, padding=1, groups=8)
        F.conv2d(x.double(), weight.double(), groups=8)
    assert torch.equal(y, F.conv2d(x, weight, padding=1, groups=8))
    assert not mode.rounded and mode.left.total() == 1
    with TF32Products(), pytest.raises(RuntimeError, match="its operands are not in benchmarks/rounding.py"):
        torch.ops.aten._convolution(
            x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 8, False, False, False, False
        )


class CountedCalls(TorchFunctionMode):
    """How often layers multiply, by whether they are depthwise; counted where they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[bool] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("conv2d", "conv_transpose2d", "linear"):
            self.calls[(kwargs or {}).get("groups", 1) > 1] += 1
        return func(*args, **(kwargs or {}))


def test_every_product_of_the_frozen_pair_is_reached_in_both_directions(subject: precision.Subject) -> None:
    pair = freeze(subject.model, backend="reference")
    with CountedCalls() as counted:
        precision.potential_and_grad(subject, pair, "energy")
    with TF32Products() as mode:
        precision.potential_and_grad(subject, pair, "energy")
    assert counted.calls[False] > 20 and counted.calls[True] > 5
    assert mode.rounded.total() == 2 * counted.calls[False] and mode.left.total() == 2 * counted.calls[True]


REDUCTIONS: dict[str, Any] = {
    "mean": lambda x: x.mean(dim=(2, 3)),
    "sum": lambda x: x.sum(dim=(2, 3)),
    "pool": lambda x: F.avg_pool2d(x, 2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bf16_reductions_round_once_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_bf16()
    monkeypatch.setattr(rounding, "PRODUCTS", {name: (REDUCTIONS[name], (2, 16, 32, 32))})
    rounding.require_float32_sums()


def test_bf16_sums_that_are_rounded_on_the_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(x: Tensor) -> Tensor:
        return sum(x[:, channel] for channel in range(x.shape[1]))  # type: ignore[return-value]

    monkeypatch.setattr(rounding, "PRODUCTS", {"sum": (one_by_one, (2, 64, 4, 4))})
    with pytest.raises(RuntimeError, match="A sum in bfloat16 rounds more than its result here"):
        rounding.require_float32_sums()


def skip_without_bf16() -> None:
    try:
        rounding.require_float32_sums()
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def subject() -> precision.Subject:
    """A golden case with two short chains."""
    small = precision.golden_subject("cifar_tiny", case_path("cifar_tiny", "nvae.pt").parent)
    return dataclasses.replace(small, seeds=range(2), batch=2, steps=3)


@pytest.fixture(scope="module")
def rows(subject: precision.Subject) -> list[dict[str, Any]]:
    skip_without_bf16()
    return precision.measure(subject)


def test_errors_grow_from_fp32_over_tf32_to_bf16(rows: list[dict[str, Any]]) -> None:
    by_name = {row["precision"]: row for row in rows}
    for kind in ("energy_gradient_error", "energy_error", "energy_rms_error"):
        fp32, tf32, bf16 = (by_name[name][kind] for name in ("fp32", "tf32", "bf16"))
        assert 0 < 100 * fp32 < tf32 < bf16 and math.isfinite(bf16), kind
    assert by_name["tf32"]["energy_gradient_error"] < by_name["tf32, cut off"]["energy_gradient_error"]
    assert by_name["fp32"]["energy_gradient_error"] < 1e-5 and by_name["bf16"]["energy_gradient_error"] < 0.2


def test_finished_images_differ_a_little_in_bf16_and_not_in_fp32(rows: list[dict[str, Any]]) -> None:
    by_name = {row["precision"]: row for row in rows}
    assert (by_name["fp32"]["largest_levels"], by_name["fp32"]["mean_levels"]) == (0, 0)
    assert 0 < by_name["tf32"]["mean_levels"] < by_name["bf16"]["mean_levels"] < 1
    assert by_name["bf16"]["largest_levels"] <= 3


def test_noise_and_energies_stay_in_float32(subject: precision.Subject) -> None:
    pair = freeze(subject.model, torch.bfloat16, "reference")
    chains = precision._sampler(subject, pair).run(subject.seeds)
    assert chains.eps.dtype == chains.potentials.dtype == torch.float32
    assert not torch.equal(chains.eps, chains.eps.bfloat16().float())  # nor is it bfloat16 in float32's clothes


def test_image_differences_are_grey_levels() -> None:
    first = torch.tensor([[0, 10, 20, 255]], dtype=torch.uint8)
    second = torch.tensor([[0, 11, 24, 0]], dtype=torch.uint8)
    assert precision.image_difference(first, second) == {"largest_levels": 255, "mean_levels": 65.0, "share_off": 0.5}


def test_the_run_writes_rows_and_says_what_was_not_at_hand(
    subject: precision.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_bf16()
    trained = dataclasses.replace(subject, name="demo", distance=lambda images: float(len(images)))
    monkeypatch.setattr(precision, "demo_subject", lambda folder: trained)
    (tmp_path / "energy").mkdir()
    (tmp_path / "energy" / "energy.safetensors").touch()
    arguments = ["--demo", str(tmp_path), "--golden", str(tmp_path / "none"), "--results", str(tmp_path)]
    precision.main(arguments)
    kept = json.loads((tmp_path / "precision_cpu.json").read_text())
    assert [row["frechet"] for row in kept["results"]] == [[2.0]] * len(kept["results"])
    text = (tmp_path / "precision_cpu.md").read_text()
    assert "| demo | bf16 |" in text and "No figure for hq_tiny: it is in none of none." in text


def test_without_a_trained_demo_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precision.main(["--demo", str(tmp_path)])
    assert "holds no trained demo; `make demo` writes runs/demo" in capsys.readouterr().err
