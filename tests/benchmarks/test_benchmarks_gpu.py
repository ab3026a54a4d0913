"""What the benchmarks do on a GPU, on one that is not there (`fake_gpu`): order, rows, failures, and the verdict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import captured, conftest, environment, measure, report
from benchmarks.gpu import stages as stages_of
from benchmarks.ops import cases, timing
from benchmarks.results_file import ResultsFile, Row
from benchmarks.step import chain_candidates, chains, pair, torch_compile
from benchmarks.step.pair import COMPILED_BF16, NHWC, PLAIN
from tests.helpers.fake_gpu import CUDA, fake_gpu  # noqa: F401
from vaebm_fast.chain import graphs
from vaebm_fast.config import ChainConfig

FROZEN = "frozen, reference"
OFFICIAL = ChainConfig(steps=1, step_size=1e-3)
on_a_gpu = pytest.mark.usefixtures("gpu")


def measured(*candidates: str, kept: list[str] | None = None) -> dict[str, Row]:
    def keep(name: str, row: Row) -> None:
        if kept is not None:
            kept.append(name)

    return pair.measure_pair("digits", 2, candidates, CUDA, rounds=1, keep=keep)


def test_a_frozen_pair_is_replayed_and_each_row_says_how_it_was_launched(gpu: list[graphs.Recording]) -> None:
    kept: list[str] = []
    rows = measured(FROZEN, PLAIN, kept=kept)
    assert kept == [FROZEN, PLAIN] and len(gpu) == 1
    assert (rows[FROZEN]["launched"], rows[PLAIN]["launched"]) == ("CUDA graph", "eager")
    weights = pair._bytes_of(pair.plain_model("digits", torch.device("cpu"), nhwc=True)) / 2**20
    assert rows[FROZEN]["peak_memory_mib"] == pytest.approx(2 * 2**10 + weights)
    assert f"| {FROZEN} (CUDA graph) |" in report.table(content("A GPU", rows[FROZEN]))


@on_a_gpu
def test_the_gradient_that_is_checked_is_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    record = graphs._record

    def wrong(function: graphs.Function, inputs: Sequence[Tensor], pool: Any) -> graphs.Recording:
        recording = record(function, inputs, pool)
        tape = recording.replay.__self__  # type: ignore[attr-defined]

        def replay() -> None:
            tape.replay()
            for entry in tape.entries:
                if entry.op is torch.ops.aten.cat.default:
                    entry.result.mul_(1.5)

        return replace(recording, replay=replay)

    monkeypatch.setattr(graphs, "_record", wrong)
    rows = measured(FROZEN, PLAIN)
    assert "The gradients of frozen, reference and of the plain modules differ by 5.0e-01" in rows[FROZEN]["refused"]
    assert rows[FROZEN]["failed"] and rows[PLAIN]["rounds"] == 1


@on_a_gpu
def test_a_step_that_cannot_be_captured_is_measured_and_said_to_be_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: graphs.Function, inputs: Sequence[Tensor], pool: Any) -> graphs.Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_record", fail)
    row = measured(FROZEN)[FROZEN]
    assert row["rounds"] == 1 and row["launched"].startswith("eager: ")
    assert row["launched"].endswith("operation not permitted when stream is capturing")


@on_a_gpu
def test_what_fails_takes_no_other_figure_with_it_and_what_was_measured_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = pair.build

    def failing(candidate: str, *arguments: Any) -> pair.Candidate:
        if candidate == NHWC:
            raise RuntimeError("no kernel image")
        if candidate == PLAIN:
            raise KeyboardInterrupt
        return build(candidate, *arguments)

    monkeypatch.setattr(pair, "build", failing)
    rows = measured(NHWC, FROZEN)
    assert rows[NHWC]["refused"] == "RuntimeError: no kernel image" and rows[NHWC]["failed"]
    assert "failed" not in rows[FROZEN] and rows[FROZEN]["rounds"] == 1
    kept: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        measured(FROZEN, PLAIN, kept=kept)
    assert kept == [FROZEN]


def test_a_gpu_has_captured_frozen_pairs_and_one_eager_one() -> None:
    captured_here = [name for name in pair.CANDIDATES if pair.is_captured(name, CUDA)]
    assert set(pair.FROZEN) - set(captured_here) == {"frozen, cuda, bf16, eager"}
    assert not any(pair.is_captured(name, torch.device("cpu")) for name in pair.CANDIDATES)
    assert not set(captured_here) & {PLAIN, NHWC, *pair.TO_COMPILE}


def test_checking_that_weights_were_folded_leaves_a_frozen_pair_fresh() -> None:
    model = pair.plain_model("digits", torch.device("cpu"), nhwc=True)
    frozen = model.freeze()
    norm = next(m for m in model.vae.post_process.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before, seen = norm.running_var.clone(), []
    torch_compile._require_folded(model, lambda: seen.append(norm.running_var.clone()) or True)
    assert torch.equal(seen[0], 2 * before) and torch.equal(norm.running_var, before) and not frozen.is_stale
    with pytest.raises(RuntimeError, match="did not fold"):
        torch_compile._require_folded(model, lambda: False)


@pytest.fixture
def timed_jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jobs that take one second and are not run; torch.compile that is not run either, with is_bf16 for a job."""
    asked: list[Any] = []

    def job(options: Any) -> tuple[float, float]:
        asked.append(options)
        return 1.0, 2.0

    def compiled(model: Any, eps_z: Any, eps_x: Any, *, is_bf16: bool) -> tuple[Any, float]:
        asked.append(is_bf16)
        return lambda eps_z, eps_x: model.potential_and_grad(eps_z, eps_x, "official"), 0.0

    monkeypatch.setattr(chain_candidates, "time_of_job", job)
    monkeypatch.setattr(chain_candidates, "compiled", compiled)
    monkeypatch.setattr(chains, "default_device", lambda: CUDA)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    return asked


@on_a_gpu
def test_chains_on_a_gpu_come_one_after_another_in_the_precision_and_on_the_backend_asked_for(
    timed_jobs: list[Any],
) -> None:
    kept: list[str] = []
    rows = chains.measure(
        "digits", OFFICIAL, batch=2, blocks=2, rounds=1, plain=True, compile=True, dtype="bfloat16",
        backend="reference", keep=lambda name, row: kept.append(name),
    )  # fmt: skip
    assert kept == [row["candidate"] for row in rows]
    assert kept == [chains.BARE, PLAIN, chains.JOB, chains.COLD, COMPILED_BF16]
    bare, plain, job, cold, compiled = rows
    assert [row["dtype"] for row in rows] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    assert [row["blocks"] for row in rows] == [2, 1, 2, 2, 1]
    assert plain["launched"] == "eager" and {row["launched"] for row in (bare, job, cold, compiled)} == {"CUDA graph"}
    options, is_bf16 = timed_jobs
    assert (options.dtype, options.backend, options.seeds) == ("bfloat16", "reference", "0-3") and is_bf16
    assert job["images_per_second"] == 4 and plain["images_per_second"] == pytest.approx(2 / plain["median_s"])
    assert plain["over_bare_chain"] == pytest.approx(plain["images_per_second"] / bare["images_per_second"])
    assert chains.JOB in report.table(content("A GPU", *rows))


@on_a_gpu
def test_a_bare_chain_is_captured_before_it_is_timed_and_a_cold_one_while(
    timed_jobs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    gpu: list[graphs.Recording],
) -> None:
    made: list[int] = []
    time_of_chain = chain_candidates.time_of_chain

    def counted(*arguments: Any) -> float:
        before = len(gpu)
        seconds = time_of_chain(*arguments)
        made.append(len(gpu) - before)
        return seconds

    monkeypatch.setattr(chain_candidates, "time_of_chain", counted)
    chains.measure("digits", OFFICIAL, batch=2, blocks=2, rounds=2, plain=False, compile=False)
    assert made == [0, 0, 1, 1]


@on_a_gpu
def test_a_chain_that_fails_is_told_and_the_others_are_measured(
    timed_jobs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")

    monkeypatch.setattr(chain_candidates.OtherPair, "potential_and_grad", fail)
    rows = chains.measure("digits", OFFICIAL, batch=2, blocks=2, rounds=1, plain=True, compile=False, job=False)
    bare, plain = rows
    assert bare["over_bare_chain"] == 1 and plain["over_bare_chain"] is None
    assert plain["refused"] == "it does not fit into memory: CUDA out of memory. Tried to allocate 80 GiB."


def test_a_chain_keeps_each_steps_energy_though_the_compiled_step_writes_over_it() -> None:
    model = pair.plain_model("digits", torch.device("cpu"), nhwc=False)
    u = torch.zeros(2)  # where every replay of torch.compile's graph leaves it

    def replayed(eps_z: Sequence[Tensor], eps_x: Tensor, potential: str) -> tuple[Tensor, Sequence[Tensor]]:
        return u.add_(1), [torch.zeros_like(eps) for eps in (*eps_z, eps_x)]

    other = chain_candidates.OtherPair(model, replayed)
    sampler = chain_candidates.LangevinSampler(other, steps=3, step_size=1e-3, capture=False)
    assert sampler.run(range(2)).potentials[:, 0].tolist() == [1, 2, 3]


@on_a_gpu
def test_an_op_on_a_gpu_is_timed_by_a_graph_of_calls_on_other_tensors_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    (case,) = cases.philox_normal_cases(2, 1000)  # 8000 bytes

    def make(device: torch.device) -> cases.Run:
        made.append(1)
        return case.make(device)

    counting = cases.Case(case.op, case.shape, case.work, make)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 5000)
    monkeypatch.setattr(timing, "GRAPH_BYTES", 40_000)
    monkeypatch.setattr(timing, "backends_of", lambda op, device, without: ["reference", "triton"])
    rows = timing.measure_case(counting, CUDA, rounds=2)
    row = rows["reference"]
    assert len(made) == row["buffers"] == 3 and row["calls"] == 5 and row["launched"] == "CUDA graph"
    assert "philox_normal cannot run with backend='triton'" in rows["triton"]["refused"] and rows["triton"]["failed"]

    def fail_behind_the_call(device: torch.device) -> None:
        if synchronised.append(device) or len(synchronised) == 2:  # 1: before the first backend, 2: behind it
            raise RuntimeError("an illegal memory access")

    synchronised: list[Any] = []
    monkeypatch.setattr(timing, "synchronize", fail_behind_the_call)
    row = timing.measure_case(counting, CUDA, rounds=2)["reference"]
    assert row["failed"] and row["refused"] == "RuntimeError: an illegal memory access"
    shared = timing._shared(measure.Sample(1.0, 0.5, 0.25, 10), 5)
    assert shared == measure.Sample(0.2, 0.1, 0.05, 2)


@pytest.mark.parametrize(("change", "failed"), [(0.0, False), (0.03, True), (-0.03, True), (float("nan"), True)])
def test_an_op_that_is_wrong_at_a_timed_shape_has_failed(
    change: float, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = cases.philox_normal_cases(2, 10)
    x = torch.linspace(-1, 1, 9)

    def make(device: torch.device) -> cases.Run:
        return lambda *, backend: (x, (1 + change) * x if backend == "cpp" else x, None)

    monkeypatch.setattr(timing, "backends_of", lambda op, device, without: ["reference", "cpp"])
    row = timing.measure_case(replace(case, make=make), torch.device("cpu"), rounds=2)["cpp"]
    assert row.get("failed", False) == failed and ("median_s" in row) != failed
    if failed:
        assert row["refused"] == f"ArithmeticError: its results are {abs(change):.0%} from those of plain PyTorch"


def test_a_gpus_ops_have_the_batches_that_its_chains_have() -> None:
    assert len(cases.GPU_CASES) == len(cases.CASES) == len({case.name for case in cases.GPU_CASES})
    assert cases.cases_of(None, CUDA) == list(cases.GPU_CASES) and cases.cases_of(None) == list(cases.CASES)
    of_chains = [case for case in cases.GPU_CASES if case.op not in ("power_iteration", "gather_images")]
    images = {int(case.shape.split("x")[0]) for case in of_chains}
    assert images == {16}
    cache = 50 * 2**20
    for case in cases.GPU_CASES:  # what the next call reads was not left in the cache by the last
        buffers = timing.buffers_of(case, cache)
        assert buffers * case.work.memory_bytes >= 4 * cache or buffers == timing.MOST_BUFFERS


def test_a_call_is_captured_or_says_why_not() -> None:
    def warn() -> None:
        import warnings

        warnings.warn("A chain could not be captured into a CUDA graph and runs eagerly: why", stacklevel=1)

    assert captured.launched_by(warn, CUDA).endswith("runs eagerly: why")
    assert captured.launched_by(lambda: None, CUDA) == "CUDA graph"
    assert captured.launched_by(lambda: None, torch.device("cpu")) == "eager"


@on_a_gpu
def test_a_backend_is_left_out_of_pairs_and_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "default_device", lambda: CUDA)
    monkeypatch.setattr(pair, "why_not", lambda name, device: None)
    names = conftest.candidates_of("celeba_64:16", None, list(stages_of.CANDIDATES), "cuda")
    assert names == [PLAIN, pair.NHWC_BF16, "frozen, reference, bf16", "frozen, triton, bf16"]
    monkeypatch.setattr(cases._backend, "why_not", lambda op, device, name: None)
    assert cases.backends_of("depthwise_swish", CUDA, without="cuda") == ["reference", "cpp", "triton"]


def test_a_result_file_is_whole_whenever_a_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ResultsFile("pair", "How long?", {}, tmp_path)
    file.add({"candidate": NHWC})
    before = file.path.read_text()

    def stopped(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        file.add({"candidate": PLAIN})
    assert file.path.read_text() == before


def test_a_copy_carries_the_commit_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_git(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setenv("VAEBM_COMMIT", "abc1234")
    assert environment.environment()["commit"] == "abc1234", "where git knows another too"
    monkeypatch.setattr(environment.subprocess, "run", without_git)
    assert environment.environment()["commit"] == "abc1234"
    monkeypatch.delenv("VAEBM_COMMIT")
    assert environment.environment()["commit"] == "unknown"


def content(gpu_name: str, *rows: Row) -> dict[str, Any]:
    where = {"device": gpu_name, "device_type": "cuda", "commit": "abc"}
    ceilings = {"matrix_gflops": 1e5, "copy_gbps": 3e3}
    return {"question": "How long?", "environment": where, "ceilings": ceilings, "results": list(rows), "refused": []}
