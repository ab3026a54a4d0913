"""On a GPU `auto` is a kernel only if it was measured to be faster there, in that dtype; otherwise plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vaebm_fast.ops import _backend, _measured
from vaebm_fast.ops._backend import choose, report, resolve
from vaebm_fast.ops._measured import PAIR, Measured
from vaebm_fast.runtime import extension

CUDA = torch.device("cuda", 0)
ROW = Measured(PAIR, "cuda", "bfloat16", 2.0, 3, "NVIDIA H200", "9.0", "2026-11-27", "abc", "0")
Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(*rows, name=..., capability=...): what was measured, and the GPU that is here, where all backends run."""
    monkeypatch.setattr(extension, "_why_missing", None)
    monkeypatch.setattr(extension, "_with_cuda", True)
    monkeypatch.setattr(_backend, "_is_installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def say(*rows: Measured, name: str = "NVIDIA H200", capability: str = "9.0") -> None:
        monkeypatch.setattr(_measured, "table", lambda: rows)
        monkeypatch.setattr(_measured, "model_of", lambda index: (name, capability))

    return say


def pair_of(dtype: torch.dtype = torch.bfloat16) -> str:
    return resolve("auto", CUDA, dtype).name


def test_nothing_measured_is_plain_pytorch_for_all(say: Say) -> None:
    say()
    assert pair_of() == pair_of(torch.float32) == pair_of(torch.float64) == "reference"
    assert {entry.backend for entry in report(CUDA)} == {"reference"}


def test_the_fastest_measured_pair_wins_if_it_is_faster_than_plain_pytorch(say: Say) -> None:
    triton = replace(ROW, backend="triton", speedup=3.0)
    say(ROW)
    assert pair_of() == "cuda" and pair_of(torch.float32) == "reference"
    say(ROW, triton)
    assert pair_of() == "triton"
    say(replace(ROW, speedup=1.0), replace(triton, speedup=0.9))
    assert pair_of() == "reference"
    say(replace(ROW, dtype="float32", speedup=1.01))
    assert pair_of(torch.float32) == "cuda" and pair_of() == "reference"


def test_a_backend_that_cannot_run_here_is_passed_over(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = replace(ROW, what="philox_normal", dtype="float32")
    say(ROW, replace(ROW, backend="triton", speedup=1.5), noise, replace(noise, backend="triton", speedup=1.5))
    assert choose("philox_normal", CUDA, "auto") == "cuda"
    monkeypatch.setattr(extension, "_with_cuda", False)
    assert pair_of() == choose("philox_normal", CUDA, "auto") == "triton"
    monkeypatch.setattr(_backend, "_is_installed", lambda package: False)
    assert pair_of() == "reference"
    assert choose("philox_normal", CUDA, "auto") == "reference"
    monkeypatch.setattr(extension, "_with_cuda", True)  # a pair on "cuda" needs Triton too
    assert pair_of() == "reference"


def test_measurements_hold_for_the_compute_capability_and_those_of_the_model_go_first(say: Say) -> None:
    say(ROW, name="NVIDIA H100 80GB HBM3")
    assert pair_of() == "cuda"
    say(ROW, name="NVIDIA A100-SXM4-80GB", capability="8.0")
    assert pair_of() == "reference"
    slower = replace(ROW, device="NVIDIA H100 80GB HBM3", speedup=0.5)
    say(ROW, slower)
    assert pair_of() == "cuda"
    say(ROW, slower, name="NVIDIA H100 80GB HBM3")
    assert pair_of() == "reference"
    say(ROW, slower, name="NVIDIA H100 PCIe")  # must be faster on all
    assert pair_of() == "reference"


def test_what_was_not_measured_on_the_model_is_as_on_others_of_its_capability(say: Say) -> None:
    noise = replace(ROW, what="philox_normal", dtype="float32")
    own = replace(ROW, device="NVIDIA H100 80GB HBM3", speedup=0.0)  # failed there
    say(ROW, noise, own, name="NVIDIA H100 80GB HBM3")
    assert pair_of() == "reference" and choose("philox_normal", CUDA, "auto") == "cuda"


def test_a_device_without_an_index_is_the_current_one(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say(ROW)
    models = {0: ("NVIDIA A100-SXM4-80GB", "8.0"), 1: ("NVIDIA H200", "9.0")}
    monkeypatch.setattr(_measured, "model_of", models.__getitem__)
    for index, rows in ((0, []), (1, [ROW])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert _measured.rows_for(torch.device("cuda")) == _measured.rows_for(torch.device("cuda", index)) == rows


def test_without_a_gpu_nothing_measured_holds(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say(ROW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pair_of() == "reference" and not _measured.rows_for(torch.device("cpu"))


def test_what_was_not_measured_so_does_not_count(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, and ROCm, whose devices are called cuda and have capabilities of their own."""
    say(replace(ROW, backend="triton", speedup=3.0))
    assert pair_of() == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pair_of() == "reference"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert pair_of() == "reference"


def test_an_op_with_a_gradient_must_be_faster_both_ways(say: Say) -> None:
    """Autograd runs the backward on the backend of the forward."""
    forward = replace(ROW, what="energy_head", backend="triton", dtype="float32")
    backward = replace(forward, what="energy_head_backward")
    say(forward)
    assert choose("energy_head", CUDA, "auto") == "reference"
    say(forward, backward)
    assert choose("energy_head", CUDA, "auto") == choose("energy_head_backward", CUDA, "auto") == "triton"
    assert choose("energy_head", CUDA, "auto", torch.bfloat16) == "reference"
    say(forward, replace(backward, speedup=0.9))
    assert choose("energy_head", CUDA, "auto") == "reference"


def test_an_op_on_bytes_is_measured_on_bytes(say: Say) -> None:
    row = replace(ROW, what="gather_images", backend="triton", dtype="float32")
    say(row)
    assert choose("gather_images", CUDA, "auto", torch.uint8) == "reference"
    say(row, replace(row, dtype="uint8"))
    assert choose("gather_images", CUDA, "auto", torch.uint8) == "triton"
    say(replace(row, dtype="uint8"))
    assert {entry.op: entry.backend for entry in report(CUDA)}["gather_images"] == "triton"


def test_ops_ask_for_the_dtype_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaebm_fast.ops import _checks
    from vaebm_fast.ops import gather_images as gather
    from vaebm_fast.ops import power_iteration as power

    asked: list[Any] = []

    def noted(op: str, device: torch.device, backend: str, dtype: torch.dtype = torch.float32) -> str:
        asked.append((op, dtype))
        return "reference"

    monkeypatch.setattr(_checks, "choose", noted)
    monkeypatch.setattr(power, "choose", noted)
    monkeypatch.setattr(gather, "choose", noted)
    x = torch.zeros(1, dtype=torch.float64)
    _checks.choose_for("pixel_head", "auto", x, None)
    power.power_iteration(x.view(1, 1, 1), x.view(1, 1), x.view(1, 1), iterations=1, eps=1e-6)
    none = torch.zeros(0, dtype=torch.int64)
    gather.gather_images(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), none, none.bool(), none, none, size=1)
    assert asked == [
        ("pixel_head", torch.float64), ("power_iteration", torch.float64), ("gather_images", torch.uint8)
    ]  # fmt: skip


def test_the_table_says_what_auto_is_on_an_h200() -> None:
    """The committed one, as people read of it in the README."""
    assert {row.device for row in _measured.table()} >= {"NVIDIA H200"}
    for row in _measured.table():
        known = _backend.GPU_BACKENDS if row.what == PAIR else _backend.OP_BACKENDS[row.what]
        assert row.backend in known and (row.cases > 0 or row.speedup == 0) and row.date and row.commit
