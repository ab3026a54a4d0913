"""The benchmark of the whole pair: what multiplies with what, and that only what agrees and fits is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, report
from benchmarks.step import pair
from benchmarks.step.pair import NHWC, PLAIN, measure_pair
from tests.helpers.benchmark_rows import CEILINGS, CPU, content, run_python


def test_what_fails_while_it_is_measured_is_refused_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text("def test_it():\n    pass\n")
    program = (
        "import sys\n"
        "from benchmarks import measure\n"
        "from benchmarks.step import bench_pair, pair\n"
        f"measure.ceilings = lambda device: {CEILINGS}\n"
        f"pair.TESTS = ({str(tmp_path / 'test_green.py')!r},)\n"
        "def measure_pair(*_, **__):\n"
        "    print('tried')\n"
        "    raise ValueError('the gradients differ')\n"
        "pair.measure_pair = measure_pair\n"
        f"sys.exit(bench_pair.main(['-s', '--results', {str(tmp_path)!r}, '--case', 'digits:1']))"
    )
    done = run_python(program)
    assert done.returncode == 1 and done.stdout.count("tried") == 1, done.stdout + done.stderr
    (path,) = tmp_path.glob("pair_*.json")
    (refused,) = json.loads(path.read_text())["refused"]
    assert refused == {"what": "digits, N = 1", "reason": "ValueError: the gradients differ"}


def test_the_pair_is_measured_with_all_that_a_row_promises() -> None:
    ballast = torch.ones(2**27)  # 512 MiB that are no part of another process's memory
    rows = measure_pair("digits", 2, [PLAIN, "frozen, reference"], CPU, rounds=1)
    plain, frozen = rows[PLAIN], rows["frozen, reference"]
    assert plain["backend"] == "plain modules" and frozen["backend"] == "reference"
    assert plain["flops"] > frozen["flops"] > 0 and plain["rounds"] == 1
    assert plain["memory_before_mib"] < plain["peak_memory_mib"] < measure.peak_memory_mib(CPU)
    del ballast
    assert plain["products"] == "float32" and plain["bytes"] == frozen["bytes"] > 0
    assert len(report.derived(content(plain, frozen))) == 2


def test_plain_modules_under_autocast_compute_in_bfloat16_and_agree() -> None:
    model = pair.plain_model("digits", CPU, nhwc=True)
    truth = pair.true_gradient("digits", 2, CPU, model)
    candidate = pair.build(pair.NHWC_BF16, "digits", 2, CPU, model)
    assert (candidate.products, candidate.backend) == ("bf16", "plain modules, autocast")
    error = float((candidate.gradient() - truth).norm() / truth.norm())
    assert 1e-4 < error < pair.AGREEMENT["bf16"]
    plain = pair.build(NHWC, "digits", 2, CPU, model)
    assert torch.allclose(plain.gradient(), truth, rtol=1e-4, atol=1e-5)


def test_what_multiplies_with_what_and_that_settings_come_back() -> None:
    gpu_device = torch.device("cuda")
    said = {name: pair.products_of(name, gpu_device) for name in pair.CANDIDATES}
    assert said[PLAIN] == said[NHWC] == pair.TORCHS_OWN and said["frozen, triton"] == "float32"
    assert said["frozen, triton, tf32"] == "tf32" and said["frozen, triton, bf16"] == said[pair.NHWC_BF16] == "bf16"
    assert pair.products_of(PLAIN, CPU) == "float32" and set(said.values()) == set(pair.AGREEMENT)

    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before, inside = settings(), {}
    for products in pair.AGREEMENT:
        with pytest.raises(KeyError), pair.multiplying(products):
            inside[products] = settings()
            raise KeyError
        assert settings() == before
    assert inside == {
        "float32": (False, "highest"),
        pair.TORCHS_OWN: (True, "highest"),
        "tf32": (True, "high"),
        "bf16": (True, "highest"),
    }
    assert before == (True, "highest")  # what torch's own setting is taken to be


def test_a_wrong_gradient_is_not_timed() -> None:
    truth = torch.ones(2, 3)
    right = pair.Candidate(lambda: None, lambda: truth + 1e-6, "reference", "float32")
    assert 0 < pair.agreement("right", right.gradient(), truth, right.products) < 1e-5
    wrong = pair.Candidate(lambda: None, lambda: truth + 1e-3, "reference", "float32")
    with pytest.raises(ValueError, match="The gradients of wrong and of the plain modules differ by 1.0e-03"):
        pair.agreement("wrong", wrong.gradient(), truth, wrong.products)


def test_what_memory_does_not_hold_is_left_out_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pair.build

    def without_nhwc(candidate: str, *arguments: Any) -> pair.Candidate:
        if candidate == NHWC:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nMore words.")
        return build(candidate, *arguments)

    monkeypatch.setattr(pair, "build", without_nhwc)
    monkeypatch.setattr(pair, "peak_memory", lambda *_: {"peak_memory_mib": 1.0, "memory_before_mib": 1.0})
    rows = measure_pair("digits", 2, [PLAIN, NHWC], CPU, rounds=1)
    reason = "it does not fit into memory: CUDA out of memory. Tried to allocate 80 GiB."
    assert rows[NHWC] == {"preset": "digits", "batch": 2, "candidate": NHWC, "refused": reason}
    assert rows[PLAIN]["rounds"] == 1


def test_what_was_left_out_is_in_the_file_and_the_table(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from benchmarks import measure\n"
        "from benchmarks.step import bench_pair, pair\n"
        f"measure.ceilings = lambda device: {CEILINGS}\n"
        "refused = {'preset': 'digits', 'batch': 1, 'refused': 'it does not fit into memory: 80 GiB'}\n"
        "pair.measure_pair = lambda *_, **__: {name: refused for name in pair.CANDIDATES}\n"
        f"arguments = ['--results', {str(tmp_path)!r}, '--case', 'digits:1', '--tested', '--into', 'pair_small']\n"
        "sys.exit(bench_pair.main(arguments))"
    )
    done = run_python(program)
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr
    (path,) = tmp_path.glob("pair_small_*.json")
    assert "No figure for digits, N = 1, plain: it does not fit into memory: 80 GiB" in report.table(
        json.loads(path.read_text())
    )


def test_on_a_gpu_every_step_is_updated_by_a_kernel_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch's noise would count against plain PyTorch's networks."""
    cuda = torch.device("cuda")
    there = {"cuda", "triton"}
    monkeypatch.setattr(pair, "op_why_not", lambda op, device, name: None if name in there else "it is not there")
    chosen = {name: pair.backend_of_update(name, cuda) for name in pair.CANDIDATES}
    assert chosen["frozen, cuda, bf16"] == "cuda" and chosen["frozen, triton"] == "triton"
    assert {chosen[name] for name in (pair.PLAIN, pair.NHWC_BF16, "frozen, reference, bf16")} == {"triton"}
    there.clear()
    assert pair.backend_of_update(pair.PLAIN, cuda) == "auto"
