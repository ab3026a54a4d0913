"""From result files to the table by which `auto` decides, and that its kernels are the ones that were measured."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import measured, sources
from benchmarks.gpu.sources import CUDA, TRITON, code_of, digest, digest_of_all
from benchmarks.step.pair import NHWC_BF16, PLAIN
from vaebm_fast.ops._backend import GPU_BACKENDS, OP_BACKENDS
from vaebm_fast.ops._measured import PAIR, Measured

H200 = {"device": "NVIDIA H200", "capability": "9.0", "date": "2026-11-27", "commit": "abc"}
REPOSITORY = measured.REPOSITORY


known = functools.cache(digest)
all_known = functools.cache(digest_of_all)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources do not change."""
    monkeypatch.setattr(measured, "digest", known)
    monkeypatch.setattr(measured, "digest_of_all", all_known)


def content(*rows: dict[str, Any], refused: tuple[dict[str, Any], ...] = (), **ran: str) -> dict[str, Any]:
    return {"environment": {**H200, **ran}, "results": list(rows), "refused": list(refused)}


def run(
    *red: str,
    outcomes: dict[str, str] | None = None,
    kernels: str | None = None,
    green: Sequence[str] = ("triton", "cuda"),
    **ran: str,
) -> dict[str, Any]:
    """What `make gpu` wrote of a run whose tests ended, with these red."""
    tests = "exit code 1" if any(test.startswith("tests/") for test in red) else "passed"
    ended = {"smoke, triton": "passed", "smoke, cuda": "passed", "tests": tests, **(outcomes or {})}
    stages = [{"stage": name, "outcome": outcome, "kernels": kernels or all_known()} for name, outcome in ended.items()]
    of_tests = {"red": list(red), "ended": ended["tests"] in ("passed", "exit code 1"), "green": list(green)}
    return {"environment": {**H200, **ran}, "stages": [*stages[:-1], {**stages[-1], **of_tests}]}


def update(old: list[Measured], contents: list[dict[str, Any]], *red: str) -> list[Measured]:
    return measured.update(old, contents, run(*red))


def pair_row(candidate: str, median_s: float, **others: Any) -> dict[str, Any]:
    names = {PLAIN: "plain modules", NHWC_BF16: "plain modules, autocast"}
    is_kernel = "triton" in candidate or "cuda" in candidate
    facts = {
        "preset": "celeba_256", "batch": 16, "candidate": candidate, "launched": "CUDA graph",
        "backend": names.get(candidate) or candidate.split(", ")[1],
        "dtype": "bfloat16" if "bf16" in candidate else "float32",
        **({"sources": known(PAIR, candidate.split(", ")[1])} if is_kernel else {}),
    }  # fmt: skip
    return {**facts, "median_s": median_s, **others}


def op_row(backend: str, median_s: float, shape: str = "16x64", **others: Any) -> dict[str, Any]:
    kernel = {} if backend == "reference" else {"sources": known("energy_head", backend)}
    facts = {"op": "energy_head", "shape": shape, "dtype": "float32", "candidate": backend, "backend": backend}
    return {**facts, **kernel, "launched": "CUDA graph", "median_s": median_s, **others}


def speedups(rows: list[Measured]) -> dict[tuple[str, str, str], float]:
    return {(row.what, row.backend, row.dtype): row.speedup for row in rows}


def test_a_factor_is_the_least_of_all_shapes_over_the_fastest_plain_pytorch_of_the_same_case() -> None:
    found = content(
        pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 9.0), pair_row(NHWC_BF16, 8.0),
        pair_row("frozen, reference, bf16", 3.0), pair_row("frozen, triton", 4.0), pair_row("frozen, reference", 6.0),
        pair_row("frozen, cuda, bf16", 2.0, batch=1), pair_row("frozen, reference, bf16", 4.0, batch=1),
    )  # fmt: skip
    rows = update([], [found])
    assert speedups(rows) == {(PAIR, "cuda", "bfloat16"): 2.0, (PAIR, "triton", "float32"): 1.5}
    assert [row.cases for row in rows] == [2, 1] and rows[0].sources == digest(PAIR, "cuda")
    assert (rows[0].device, rows[0].capability, rows[0].date, rows[0].commit) == tuple(H200.values())
    ops = content(op_row("reference", 4.0), op_row("triton", 1.0), op_row("reference", 4.0, "1x3"), op_row("triton", 5.0, "1x3"))  # fmt: skip # noqa: E501
    assert speedups(update([], [ops])) == {("energy_head", "triton", "float32"): 0.8}


def test_half_precision_of_plain_pytorch_is_no_rival_of_a_float32_pair_nor_an_eager_row_a_pair() -> None:
    found = content(
        pair_row("frozen, triton", 4.0), pair_row(NHWC_BF16, 1.0), pair_row(PLAIN, 8.0),
        pair_row("frozen, cuda, bf16, eager", 100.0, launched="eager"), pair_row("frozen, cuda, bf16", 0.5),
        pair_row("frozen, triton, tf32", 5.0),
    )  # fmt: skip
    rows = speedups(update([], [found]))
    assert len(rows) == 2
    assert rows[PAIR, "triton", "float32"] == 2.0 and rows[PAIR, "cuda", "bfloat16"] == 2.0


def test_a_pair_that_could_not_be_captured_is_measured_as_it_ran() -> None:
    found = content(pair_row("frozen, cuda, bf16", 2.0, launched="eager: why"), pair_row(PLAIN, 1.0))
    assert speedups(update([], [found])) == {(PAIR, "cuda", "bfloat16"): 0.5}


def test_files_are_not_compared_with_each_other() -> None:
    first = content(pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 2.0))
    second = content(pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 3.0), date="2026-11-28", commit="def")
    third = content(pair_row("frozen, cuda, bf16", 1.0))
    (row,) = update([], [second, third, first])
    assert (row.speedup, row.cases, row.commit) == (2.0, 2, "abc"), "the file with the least factor is named"


def test_each_gpu_model_has_rows_of_its_own() -> None:
    h200 = content(pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 2.0))
    a100 = content(
        pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 3.0), device="NVIDIA A100-SXM4-80GB", capability="8.0"
    )
    first = update([], [h200, a100])
    assert [(row.device, row.capability, row.speedup, row.cases) for row in first] == [("NVIDIA H200", "9.0", 2.0, 1)]
    rows = measured.update(first, [h200, a100], run(device="NVIDIA A100-SXM4-80GB", capability="8.0"))
    assert [row.speedup for row in rows] == [3.0, 2.0] and rows[1] == first[0]


def test_what_failed_has_factor_0_and_what_did_not_fit_into_memory_did_not_fail() -> None:
    """So that no other model's row takes its place."""
    old = Measured(PAIR, "cuda", "bfloat16", 3.0, 1, "NVIDIA H200", "9.0", "2026-11-01", "old", known(PAIR, "cuda"))
    elsewhere = replace(old, device="NVIDIA A100-SXM4-80GB", capability="8.0")
    facts = {"preset": "celeba_256", "batch": 64, "candidate": "frozen, cuda, bf16", "sources": known(PAIR, "cuda")}
    full = {"what": "celeba_256", "reason": "it does not fit into memory", **facts}
    works = content(pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 2.0), refused=(full,))
    assert speedups(update([old], [works])) == {(PAIR, "cuda", "bfloat16"): 2.0}
    fails = content(refused=({**full, "failed": True},))
    for contents in ([fails], [works, fails]):
        rows = update([old, elsewhere], contents)
        assert rows[0] == elsewhere and rows[1].speedup == 0 and rows[1].commit == "abc"
    eager = {**full, "candidate": "frozen, cuda, bf16, eager", "failed": True}  # for comparison alone
    assert speedups(update([], [{**works, "refused": [eager]}])) == {(PAIR, "cuda", "bfloat16"): 2.0}
    whole = content(refused=({"what": "celeba_256, N = 16", "reason": "a test is red"},))
    assert update([old], [whole]) == [old]
    other = content(op_row("reference", 4.0), op_row("triton", 1.0))
    assert len(update([old, elsewhere], [other])) == 3


def test_a_part_of_the_shapes_takes_no_row_of_all_of_them_back() -> None:
    """Such as the rows of a stage that was stopped."""
    fast, slow = (op_row("reference", 4.0), op_row("triton", 1.0)), (op_row("reference", 4.0, "1x3"), op_row("triton", 8.0, "1x3"))  # fmt: skip # noqa: E501
    whole = update([], [content(*fast, *slow)])
    assert [(row.speedup, row.cases) for row in whole] == [(0.5, 2)]
    assert update(whole, [content(*fast)]) == whole
    assert [row.cases for row in update(whole, [content(*slow)])] == [1], "it is no faster"
    (again,) = update(whole, [content(*fast, op_row("reference", 4.0, "1x3"), op_row("triton", 2.0, "1x3"))])
    assert (again.speedup, again.cases) == (2.0, 2)


def test_what_ran_on_another_gpu_says_nothing_of_this_one() -> None:
    rows = [content(op_row("reference", 4.0), op_row("triton", 1.0))]
    ended = run()
    ended["stages"].append({"stage": "memcheck", "device": "NVIDIA L4", "red": ["memcheck (exit code 9)"]})
    assert [row.speedup for row in measured.update([], rows, ended)] == [4.0]
    ended["stages"][-1]["device"] = H200["device"]
    assert [row.speedup for row in measured.update([], rows, ended)] == [0.0]
    (row,) = measured.update([], rows, ended)
    assert row.cases == 0
    (row,) = measured.update([], rows, {**ended, "environment": {**H200, "commit": "later", "date": "2026-12-01"}})
    assert (row.commit, row.date) == ("later", "2026-12-01")


def test_red_tests_of_ops_or_the_pair_withhold_a_row_and_others_do_not() -> None:
    rows = content(pair_row("frozen, cuda, bf16", 1.0), pair_row("frozen, triton, bf16", 1.0), pair_row(PLAIN, 2.0))

    def left(red: str) -> list[str]:
        return [row.backend for row in update([], [rows], red) if row.speedup]

    assert left("tests/test_gpu.py::test_the_frozen_pair_has[cuda-torch.bfloat16]") == ["triton"]
    assert left("tests/test_gpu.py::test_sanitised_op[pixel_head 2x20-triton]") == [], (
        "a pair on cuda runs Triton's too"
    )
    assert left("tests/test_gpu.py::test_a_frozen_step[cuda-reference]") == ["triton"]
    assert left("tests/ops/test_langevin_update.py::test_a[cuda]") == ["cuda", "triton"]
    assert measured._speaks_against("langevin_update", "cuda", "tests/ops/test_langevin_update.py::test_a[cuda]")
    assert left("tests/csrc/test_inverted_residual_cuda.py::test_the_op") == ["triton"]
    assert left("smoke, cuda (exit code -11)") == ["triton"] and left("smoke, triton (exit code -11)") == []
    for about_all in (
        "tests/test_gpu.py (exit code 139; see tests_test_gpu.log)",
        "tests/test_gpu.py",
        "tests/test_gpu.py::test_a_frozen_step",
        "racecheck (exit code 9)",
    ):
        assert left(about_all) == [], about_all
    for other in (
        "tests/training/test_replay_gpu.py::test_a[cuda]",
        "tests/training/test_replay_gpu.py (exit code 139; see tests_test_replay_gpu.log)",
        "tests/test_gpu.py::test_a_sampling_job",
        "tests/test_gpu.py::test_sanitised_op[power_iteration 2x37x140-cuda]",
        "tests/test_gpu.py::test_sanitised_noise_and_update[cuda]",
        "tests/test_gpu.py::test_a_frozen_step_has_its_reference[torch.float32-reference]",
        "racecheck (stopped after 6 s)",
        "smoke, cuda (exit code 2)",
        "smoke, triton (exit code 4)",
        "memcheck (exit code 1)",
        "memcheck (exit code 99)",
        "tests (stopped after 120 s)",
        "smoke, cuda (stopped after 60 s)",
    ):
        assert left(other) == ["cuda", "triton"], other
    for test, factor in (
        ("tests/test_gpu.py::test_sanitised_op_agrees_with_its_reference[energy_head 1x2-triton]", 4.0),
        ("tests/test_gpu.py::test_sanitised_op_agrees_with_its_reference[energy_head 1x2-cuda]", 0.0),
        ("tests/test_gpu.py::test_sanitised_op_agrees_with_its_reference[energy_epilogue 1x2-cuda]", 4.0),
        ("smoke, cuda (exit code -11)", 0.0),
    ):
        (row,) = update([], [content(op_row("reference", 4.0), op_row("cuda", 1.0))], test)
        assert row.speedup == factor, test


@pytest.mark.parametrize("what", ["philox_normal", "langevin_update"])
def test_red_tests_of_noise_speak_against_noise_and_update_of_their_backend(what: str) -> None:
    for test in (
        "tests/test_gpu.py::test_sanitised_noise_and_update[cuda-6]",
        "tests/chain/test_noise.py::test_a[cuda]",
    ):
        assert measured._speaks_against(what, "cuda", test) and not measured._speaks_against(what, "triton", test)


def test_a_red_test_also_withdraws_what_was_measured_before_and_on_other_models() -> None:
    """A backend with red smoke tests has no results in that run."""
    pair = Measured(PAIR, "cuda", "bfloat16", 3.0, 1, "NVIDIA H200", "9.0", "2026-11-01", "old", known(PAIR, "cuda"))
    noise = replace(pair, what="philox_normal", backend="triton", dtype="float32", sources=known("philox_normal", "triton"))  # fmt: skip # noqa: E501
    a100 = replace(pair, device="NVIDIA A100-SXM4-80GB", capability="8.0")

    def after(*red: str, **ran: str) -> dict[tuple[str, str], float]:
        rows = measured.update([pair, noise, a100], [], run(*red, **ran))
        return {(row.device, row.what): row.speedup for row in rows}

    before = after()
    assert set(before.values()) == {3.0} and len(before) == 3
    for red in ("tests/test_gpu.py::test_sanitised_op[a-cuda]", "smoke, cuda (exit code 139)"):
        assert after(red) == {**before, ("NVIDIA H200", PAIR): 0.0}
        h100 = after(red, device="NVIDIA H100 80GB HBM3")
        assert h100 == {**before, ("NVIDIA H100 80GB HBM3", PAIR): 0.0}
        assert after(red, device="NVIDIA L4", capability="8.9") == before
    assert sorted(after("memcheck (exit code 9)").values()) == [0.0, 0.0, 3.0]
    assert after("tests/training/test_replay_gpu.py::test_a") == before


@pytest.mark.parametrize(
    ("ended", "recorded"),
    [
        (run(), {"triton", "cuda"}),
        (run("tests/training/test_replay_gpu.py::test_a"), {"triton", "cuda"}),
        (run(outcomes={"smoke, cuda": "exit code 1"}), {"triton"}),
        (run(outcomes={"smoke, triton": "stopped after 60 s"}), {"cuda"}),
        (run(outcomes={"smoke, triton": "every test was skipped"}), {"cuda"}),
        (run(outcomes={"tests": "stopped after 120 s"}), set()),
        (run(outcomes={"tests": "no time left"}), set()),
        (run(outcomes={"tests": "exit code 2"}), set()),
        (run(green=["triton"]), {"triton"}),
        (run() | {"stages": run()["stages"][:2]}, set()),
        (run(kernels="others"), set()),
    ],
)
def test_what_was_not_tested_with_these_kernels_has_not_passed(ended: dict[str, Any], recorded: set[str]) -> None:
    """Its figures are passed over, and rows that there were stay."""
    assert measured.tested_backends(ended) == recorded
    ops = content(op_row("reference", 4.0), op_row("triton", 1.0), op_row("cuda", 1.0))
    pairs = content(pair_row("frozen, cuda, bf16", 1.0), pair_row("frozen, triton, bf16", 1.0), pair_row(PLAIN, 2.0))
    rows = measured.update([], [ops, pairs], ended)
    assert {row.backend for row in rows if row.what != PAIR} == recorded
    needed = {"cuda": {"cuda", "triton"}, "triton": {"triton"}}  # a pair on cuda runs Triton's kernels, too
    assert {row.backend for row in rows if row.what == PAIR} == {n for n in needed if needed[n] <= recorded}
    old = [replace(row, speedup=9.0) for row in update([], [ops, pairs])]
    kept = {row.backend: row.speedup for row in measured.update(old, [ops], ended) if row.what != PAIR}
    assert kept == {name: 4.0 if name in recorded else 9.0 for name in ("triton", "cuda")}


def test_rows_of_other_kernels_or_of_unknown_ones_are_passed_over() -> None:
    for facts in ({"sources": "0"}, {"sources": None}):
        assert update([], [content(pair_row("frozen, cuda, bf16", 1.0, **facts), pair_row(PLAIN, 2.0))]) == []


def test_the_command_keeps_other_rows_and_drops_those_of_changed_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
    measured.write_rows([])
    (tmp_path / "ops_cuda.json").write_text(json.dumps(content(op_row("reference", 4.0), op_row("triton", 1.0))))
    (tmp_path / "pair_cuda.json").write_text(
        json.dumps(content(pair_row("frozen, cuda, bf16", 1.0), pair_row(PLAIN, 2.0)))
    )
    with pytest.raises(SystemExit):
        measured.main(["--results", str(tmp_path)])
    assert "has no gpu_run.json, which `make gpu` writes" in capsys.readouterr().err and measured.read() == []

    def record(ended: dict[str, Any]) -> str:
        (tmp_path / "gpu_run.json").write_text(json.dumps(ended))
        assert measured.main(["--results", str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert "energy_head, triton, float32: 4.00x plain PyTorch (NVIDIA H200, 2026-11-27)\n" in record(run())
    assert len(measured.read()) == 2
    out = record(run("smoke, triton (exit code 1)", outcomes={"smoke, triton": "exit code 1"}))
    assert "triton: no new rows, because its smoke tests have not passed" in out and "cuda: no new" not in out
    assert [row.speedup for row in measured.read()] == [0.0, 0.0], "a pair on cuda runs Triton's kernels"
    record(run(outcomes={"tests": "stopped after 120 s"}))
    assert [row.speedup for row in measured.read()] == [0.0, 0.0], "it has not been green since"
    record(run())
    assert len(measured.read()) == 2 and all(row.speedup for row in measured.read())
    monkeypatch.setattr(measured, "digest", lambda what, backend: digest(what, backend) + "0" * (what == PAIR))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "gpu_run.json").write_text(json.dumps(run()))
    assert measured.main(["--results", str(tmp_path / "empty")]) == 0
    assert [row.what for row in measured.read()] == ["energy_head"]
    assert "frozen pair, cuda, bfloat16: dropped, because its kernel is no longer" in capsys.readouterr().out
    for damaged in ("{", "{}"):
        (tmp_path / "empty" / "ops_cuda.json").write_text(damaged)
        with pytest.raises(SystemExit):
            measured.main(["--results", str(tmp_path / "empty")])
        assert "measured.json has no figures of ops_cuda.json (" in capsys.readouterr().err
    cuda = replace(measured.read()[0], backend="cuda", sources=known("energy_head", "cuda"))
    measured.write_rows([cuda])
    (tmp_path / "empty" / "gpu_run.json").write_text(json.dumps(run("smoke, cuda (exit code 139)")))
    with pytest.raises(SystemExit):
        measured.main(["--results", str(tmp_path / "empty")])
    assert [row.speedup for row in measured.read()] == [0.0], "beside a damaged file, too"
    assert "; not for auto; red: smoke, cuda (exit code 139)\n" in capsys.readouterr().out
    measured.write_rows([cuda])
    for damaged in ("{", "[]", "{}", '{"environment": {"device": "NVIDIA H200"}, "stages": []}'):
        (tmp_path / "empty" / "gpu_run.json").write_text(damaged)
        with pytest.raises(SystemExit):
            measured.main(["--results", str(tmp_path / "empty")])
        assert "measured.json is unchanged: " in (said := capsys.readouterr().err) and "gpu_run.json is damaged" in said
    assert measured.read() == [cuda]
    with pytest.raises(SystemExit):
        measured.main(["--results", str(tmp_path / "missing")])
    assert "There is no folder" in capsys.readouterr().err and len(measured.read()) == 1


def test_the_committed_results_give_the_committed_table() -> None:
    paths = [path for name in ("ops", "pair*") for path in measured.RESULTS.glob(f"{name}_cuda.json")]
    rows = measured.rows_of([json.loads(path.read_text()) for path in paths])
    table = {(row.what, row.backend, row.dtype): row for row in measured.read() if row.device == rows[0].device}
    assert {(row.what, row.backend, row.dtype): row for row in rows} == table
    ended = json.loads((measured.RESULTS / measured.RUN).read_text())
    assert measured.update(measured.read(), [], ended) == measured.read(), "nothing was red"


def test_the_kernels_in_the_table_are_those_that_were_measured() -> None:
    changed = [f"{row.what} on {row.backend}" for row in measured.read() if not measured.is_present(row)]
    assert not changed, (
        f"The kernels of {', '.join(changed)} changed after they were measured. Measure them (`make gpu`), or let "
        "`auto` be plain PyTorch until then: `python -m benchmarks measured` drops their rows."
    )


def test_what_tune_writes_is_no_change_of_a_kernel(copy: Path) -> None:
    """It was timed; the code around it counts."""
    before = digest("pointwise", "triton", copy)
    edited(copy / TRITON / "pointwise.py", lambda text: text.replace('("large", "half"): Config(128', '("large", "half"): Config(64'))  # fmt: skip # noqa: E501
    assert digest("pointwise", "triton", copy) == before
    edited(copy / TRITON / "pointwise.py", lambda text: text.replace("GROUP = 8", "GROUP = 4"))
    assert digest("pointwise", "triton", copy) != before


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in (TRITON, Path("csrc")):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    return tmp_path


def edited(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    path.write_text(change(text), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "what", "backend"),
    [
        (CUDA / "philox_normal.cu", "philox_words", "cuda"),
        (Path("csrc/math.h"), "langevin_update", "cuda"),  # by langevin.h and philox.h
        (CUDA / "swish.h", PAIR, "cuda"),
        (TRITON / "gaussian_latent.py", PAIR, "cuda"),  # which runs Triton's
        (TRITON / "activation.py", "residual_tail_backward", "triton"),  # by depthwise_swish.py
    ],
    ids=str,
)
def test_a_digest_sees_code_and_not_comments(file: Path, what: str, backend: str, copy: Path) -> None:
    before = digest(what, backend, copy)
    assert before == digest(what, backend)
    remark = "# a remark\n" if file.suffix == ".py" else "// a remark\n/* and\n\n another */\n"
    edited(copy / file, lambda text: text + "\n" + remark)
    assert digest(what, backend, copy) == before
    edited(copy / file, lambda text: text + "\nint x = 1;\n")
    assert digest(what, backend, copy) != before


def test_the_digest_of_all_sees_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[str, str]] = []
    monkeypatch.setattr(sources, "digest", lambda *of: f"{of}{'!' * (of in changed)}")
    before = digest_of_all()
    for op, backends in OP_BACKENDS.items():
        for backend in (name for name in backends if name in GPU_BACKENDS):
            changed[:] = [(op, backend)]
            assert digest_of_all() != before


def test_a_digest_does_not_see_other_kernels(copy: Path) -> None:
    before = digest("philox_normal", "triton", copy), digest("depthwise_swish", "cuda", copy)
    edited(copy / TRITON / "energy_head.py", lambda text: text + "\nx = 1\n")
    edited(copy / CUDA / "philox_normal.cu", lambda text: text + "\nint x;\n")
    assert (digest("philox_normal", "triton", copy), digest("depthwise_swish", "cuda", copy)) == before


def test_code_is_what_python_and_the_compiler_read(tmp_path: Path) -> None:
    module, header = tmp_path / "kernel.py", tmp_path / "kernel.h"
    module.write_text('"""Docs."""\n\nx = "text"  # remark\n\n\ndef f():\n    """More."""\n    return x\n')
    assert code_of(module).split() == ["x", "=", '"text"', "def", "f", "(", ")", ":", "return", "x"]
    header.write_text("// remark\nint  a = 1;  // b\n\n/* c\nd */ int e;\n")
    assert code_of(header) == "int a = 1;\nint e;"


def test_results_name_the_sources_of_gpu_kernels_alone() -> None:
    assert sources.sources_of("energy_head", "triton") == {"sources": digest("energy_head", "triton")}
    assert sources.sources_of("energy_head", "cpp") == {} == sources.sources_of(PAIR, "reference")
