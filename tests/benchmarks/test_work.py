"""The counted work: memory against the tensors that the ops touch, docstrings against counts, steps counted again."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch

from benchmarks import work
from benchmarks.ops import cases
from benchmarks.work import STEPS, BothWays, StepWork, Work
from vaebm_fast import PRESETS
from vaebm_fast.evaluation.cost import bytes_moved, least_traffic, pair_flops
from vaebm_fast.ops._backend import OP_BACKENDS, why_absent

META = torch.device("meta")
# One small case of each op and its backward. Weights and per-image values, which the counts leave out, are few beside
# 4096 pixels.
SMALL = [
    *cases.depthwise_cases(1, 32, 64),
    *cases.depthwise_cases(1, 32, 64, upsample=True),
    *cases.pointwise_cases(1, 32, 64, 64),
    *cases.pointwise_cases(1, 64, 32, 64, activation="swish"),
    *cases.bilinear_upsample_cases(1, 32, 64),
    *cases.inverted_residual_cases(1, 64, 384, 64),
    *cases.energy_epilogue_cases(1, 32, 64),
    *cases.energy_head_cases(1, 32, 64),
    *cases.se_gate_residual_cases(1, 64, 64),
    *cases.residual_tail_cases(1, 64, 32, 64),
    *cases.residual_tail_cases(1, 64, 32, 64, upsample=True),
    *cases.heads_cases(1, 20, 64),
    *cases.heads_cases(1, 3, 64, pixels=True),
    *cases.philox_normal_cases(2, 4096),
    *cases.gather_images_cases(4, 64, M=4),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_memory_is_that_of_the_tensors_that_an_op_touches(case: cases.Case) -> None:
    backends = [name for name in OP_BACKENDS[case.op] if name in ("triton", "cuda")]
    backend = "triton" if "triton" in backends else backends[0]
    if why_absent("cpp" if backend == "cuda" else backend):  # the fakes of CUDA kernels are in the compiled part
        pytest.skip(str(why_absent(backend)))
    run = case.make(META)
    assert bytes_moved(lambda: run(backend=backend)) == pytest.approx(case.work.memory_bytes, rel=0.05)


def test_every_op_with_a_case_is_counted_again_but_those_that_work_in_place_or_iterate() -> None:
    counted = {case.op for case in SMALL}
    assert {case.op for case in cases.CASES} - counted == {"langevin_update", "power_iteration"}
    N, D = 3, 1000
    assert work.langevin_update(N, D).memory_bytes == 3 * 4 * N * D, "eps read and written, gradient read"
    assert work.power_iteration(2, 3, 5, 4) == Work(4 * 30, fp32_flop=4 * 4 * 30)


def docstring(op: str) -> str:
    """Of the public function, on one line."""
    module = importlib.import_module(f"vaebm_fast.ops.{op.removesuffix('_backward')}")
    return " ".join(str(inspect.getdoc(getattr(module, op))).split())


@pytest.mark.parametrize(
    ("op", "with_skip", "without_skip"),
    [("energy_epilogue", work.energy_epilogue(1), work.energy_epilogue(1, skip=False)),
     ("energy_head", work.energy_head(1), work.energy_head(1, skip=False))],
)  # fmt: skip
def test_docstrings_say_the_counted_bytes_with_and_without_a_skip(
    op: str, with_skip: BothWays, without_skip: BothWays
) -> None:
    for name, most, least in zip((op, f"{op}_backward"), with_skip, without_skip, strict=True):
        said = re.search(r"Moves (\d+) bytes per element(?: of y)?, (\d+) without a skip", docstring(name))
        assert said is not None and [int(number) for number in said.groups()] == [most.memory_bytes, least.memory_bytes]


@pytest.mark.parametrize(
    ("op", "counted"),
    [("se_gate_residual", work.se_gate_residual(1)), ("gaussian_latent", work.gaussian_latent(1)),
     ("pixel_head", work.pixel_head(1)), ("langevin_update", work.langevin_update(1, 4)),
     ("gather_images", work.gather_images(4, 1, 1))],
)  # fmt: skip
def test_docstrings_say_the_counted_bytes(op: str, counted: BothWays | Work) -> None:
    if isinstance(counted, Work):
        said = re.search(r"Moves (\d+) bytes per element", docstring(op))
        assert said is not None and int(said[1]) == counted.memory_bytes / 4
        return
    for name, each in zip((op, f"{op}_backward"), counted, strict=True):
        said = re.search(r"Moves (\d+) bytes per element", docstring(name))
        assert said is not None and int(said[1]) == each.memory_bytes


def test_arithmetic_is_what_the_docstrings_say() -> None:
    C, hidden, K = 3, 7, 5
    assert "4 C hidden + 2 K^2 hidden" in docstring("inverted_residual")
    forward, backward = work.inverted_residual(1, C, hidden, 1, K)
    assert forward.flop == 4 * C * hidden + 2 * K**2 * hidden
    assert "6 C hidden + 2 K^2 hidden" in docstring("inverted_residual_backward")
    assert backward.flop == 6 * C * hidden + 2 * K**2 * hidden
    assert "2 Cin Cout FLOP per pixel" in docstring("pointwise") and work.pointwise(1, 3, 7, 1).forward.flop == 2 * 21
    said = "2 K^2 FLOP per element of y, with `upsample` 2 ((K + 1) / 2)^2"
    assert said in docstring("depthwise_swish") and work.depthwise_swish(1, 1, 1, K).forward.flop == 2 * K**2
    assert work.depthwise_swish(1, 1, 1, K, upsample=True).forward.flop == 4 * 2 * 3**2
    assert "2 K^2 hidden (with `upsample` 2 ((K + 1) / 2)^2 hidden) + 2 C hidden" in docstring("residual_tail")
    assert work.residual_tail(1, hidden, C, 1, K).backward.flop == 2 * K**2 * hidden + 2 * C * hidden
    assert "4 M K FLOP per matrix" in docstring("power_iteration")


@pytest.mark.parametrize("op", ["residual_tail_backward"])
def test_a_tail_reads_the_gradient_twice_and_s_once(op: str) -> None:
    assert "Moves each element of dy twice, of s, h, h2 and dh once, and of the gradient for h2 twice" in docstring(op)


def test_every_preset_has_its_work() -> None:
    assert set(STEPS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_work_of_a_step_is_counted_again(preset: str) -> None:
    traffic = least_traffic(preset)
    assert STEPS[preset] == StepWork(*pair_flops(preset), int(traffic.per_image), int(traffic.per_step))


def test_bytes_follow_the_batch_and_the_size_of_an_element() -> None:
    step = StepWork(1, 1, bytes_per_image=10, bytes_per_step=4)
    assert step.least_bytes(3, 2) == 34 and step.least_bytes(3, 4) == 68
    assert work.energy_epilogue(10, bytes_each=2).forward.memory_bytes == 60
