"""The benchmarks' own arithmetic, and that nothing red is measured. Their figures are no tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import gate, measure, report
from benchmarks.conftest import Replay
from benchmarks.gpu import stages as gpu
from benchmarks.ops import cases
from benchmarks.results_file import ResultsFile
from benchmarks.step import chains
from benchmarks.step.pair import COMPILED, NHWC, PLAIN
from tests.helpers.benchmark_rows import CEILINGS, CPU, content, op_row, pair_row, run_python
from vaebm_fast.config import ChainConfig
from vaebm_fast.ops._backend import OP_BACKENDS
from vaebm_fast.runtime.errors import UserError


def test_rates_ratios_and_shares() -> None:
    plain, nhwc, fast = report.derived(content(pair_row(PLAIN, 0.8), pair_row(NHWC, 0.4), pair_row("frozen, cpp", 0.2)))
    assert (plain["over plain"], nhwc["over plain"], fast["over plain"]) == (1, 2, 4)
    assert fast["over plain NHWC"] == 2 and fast["over reference"] is None
    assert fast["gflops"] == pytest.approx(40) and fast["matrix_share"] == pytest.approx(0.4)
    slow, op = report.derived(content(op_row("reference", 4e-4), op_row("cpp", 2e-4)))
    assert op["over reference"] == 2 and slow["over plain"] is None
    assert op["gbps"] == pytest.approx(5) and op["copy_share"] == pytest.approx(0.5)


def test_the_roofline_is_the_nearer_ceiling_in_what_the_row_multiplies_with() -> None:
    rows = [
        pair_row("frozen, triton", 0.2, products="float32", bytes=10**9),  # 40 of 100 GFLOP/s, 5 of 10 GB/s
        pair_row("plain", 0.2, products="tf32 in cuDNN", bytes=0),
        pair_row("frozen, triton, bf16", 0.2, products="bf16", bytes=0),
    ]
    given = content(*rows)
    given["ceilings"] = CEILINGS | {"matrix_gflops_tf32": 400.0, "matrix_gflops_bf16": 800.0}
    fp32, tf32, bf16 = report.derived(given)
    assert (fp32["matrix_share"], fp32["copy_share"]) == (pytest.approx(0.4), pytest.approx(0.5))
    assert fp32["roofline_share"] == pytest.approx(0.5)
    assert (tf32["roofline_share"], bf16["roofline_share"]) == (pytest.approx(0.1), pytest.approx(0.05))
    assert "100 GFLOP/s, 400 GFLOP/s in tf32, 800 GFLOP/s in bf16" in report.table(given)


def test_a_ratio_is_taken_within_its_own_case_only() -> None:
    rows = report.derived(content(pair_row(PLAIN, 0.8, batch=1), pair_row("frozen, cpp", 0.2, batch=4)))
    assert rows[1]["over plain"] is None


def test_tables_hold_every_row_under_its_columns() -> None:
    text = report.table(content(pair_row(PLAIN, 0.8), pair_row(COMPILED, 0.2, compile_s=60.0, peak_memory_mib=None)))
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert cells[0]["s/image/step"] == "0.400" and cells[1]["x plain"] == "4.00"
    assert cells[1]["peak MiB"] == "-" and cells[1]["p20 - p80"] == "0.090 - 0.110"
    assert f"torch {torch.__version__}" in text and "matrix product 100 GFLOP/s" in text


def test_the_report_writes_tables_and_plot_and_only_its_part_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "pair_cpu.json").write_text(json.dumps(content(pair_row(PLAIN, 0.8), pair_row("frozen, cpp", 0.2))))
    (tmp_path / "ops_cpu.json").write_text(json.dumps(content(op_row("reference", 4e-4), op_row("cpp", 2e-4))))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # a second run changes nothing
        report.main(["--results", str(tmp_path), "--readme", str(readme)])
        text = readme.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"\n{report.END}\nafter\n")
        assert text.count("| digits, 2 | 400 | 100 | 4.0 | - | 40 |") == 1 and "old" not in text
    assert "| digits, 2 | frozen, cpp | 0.100 |" in (tmp_path / "pair_cpu.md").read_text()
    assert (tmp_path / "pair_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| blur | 1x2 | cpp | 0.200 |" in (tmp_path / "ops_cpu.md").read_text()
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="needs the line"):
        report.main(["--results", str(tmp_path), "--readme", str(readme)])


def test_a_case_has_one_line_in_the_readme_with_the_gains_of_its_fastest_frozen_candidate() -> None:
    rows = [
        pair_row("frozen, cpp", 0.2, batch=4),
        pair_row("frozen, reference", 0.4, batch=4),
        pair_row(NHWC, 0.6, batch=4),
        pair_row(PLAIN, 8.0, batch=4),
        pair_row(PLAIN, 2.0, batch=1),
    ]
    header, _, *lines = report.by_case(report.derived(content(*rows))).splitlines()
    candidates = "frozen, cpp | frozen, reference | plain NHWC | plain"
    assert header == f"| preset, N | {candidates} | x plain | x plain NHWC | % of ceiling |"
    assert lines[0] == "| digits, 1 | - | - | - | 2,000 | - | - | - |"
    assert lines[1].startswith("| digits, 4 | 50 | 100 | 150 | 2,000 | 40.0 | 3.0 | ")


def test_the_readme_has_the_markers() -> None:
    text = report.README.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1


def test_candidates_take_turns_and_each_is_first_once() -> None:
    calls: list[str] = []
    samples = measure.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [len(taken) for taken in samples.values()] == [3, 3, 3]


def test_rounds_follow_the_length_of_a_call() -> None:
    assert [measure.rounds_for(call_s, 2.0) for call_s in (1e-6, 0.1, 1.0, 3.1)] == [100, 20, 5, 3]


def test_a_sample_sees_time_and_fresh_memory() -> None:
    taken = measure.sample(lambda: torch.ones(2**23), CPU)  # 32 MiB
    assert taken.wall_s > 0 and taken.user_s + taken.system_s > 0
    summary = measure.summary([measure.Sample(float(wall_s), 1.0, 0.5, 3) for wall_s in (5, 1, 2, 4, 3)])
    assert (summary["median_s"], summary["p20_s"], summary["p80_s"], summary["rounds"]) == (3, 2, 4, 5)


def test_the_replayed_timer_gives_the_measured_times() -> None:
    timer = Replay()
    timer.load([0.25, 0.5])
    assert [-timer() + timer() for _ in range(2)] == [0.25, 0.5]


def test_ceilings_are_rates() -> None:
    found = measure.ceilings(CPU, sides=(64,))
    assert found["matrix_gflops"] > 0 and found["copy_gbps"] > 0


def test_a_result_file_holds_what_ran_after_every_row(tmp_path: Path) -> None:
    ResultsFile("pair", "An older run", CEILINGS, tmp_path).refuse("blur", "red")
    file = ResultsFile("pair", "How long?", CEILINGS, tmp_path)
    assert json.loads(file.path.read_text())["question"] == "An older run", "kept until there is a row"
    file.add(pair_row(PLAIN, 1.0, times_s=[1.0, 2.0]))
    file.add(pair_row(NHWC, 1.0))
    file.refuse("blur", "red\nmore")
    text = file.path.read_text()
    kept = json.loads(text)
    assert kept["results"] == [pair_row(PLAIN, 1.0), pair_row(NHWC, 1.0)] and text.count('"candidate"') == 2
    assert sum('"candidate"' in line for line in text.splitlines()) == 2, "a line per row"
    assert kept["results"][0]["candidate"] == PLAIN and kept["refused"][0]["what"] == "blur"
    assert {"device", "torch", "commit", "threads", "date"} <= set(kept["environment"])
    assert "No figure for blur: red\n" in report.table(kept)


@pytest.mark.parametrize("body", ["assert False", "raise ImportError"])
def test_a_red_test_is_seen(body: str, tmp_path: Path) -> None:
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text(f"def test_it():\n    {body}\n")
    green.write_text("def test_it():\n    pass\n")
    reason = gate.why_red(str(green), str(red))
    assert reason is not None and "exit code 1" in reason and "test_it" in reason


def test_green_tests_are_not_red_and_missing_ones_are(tmp_path: Path) -> None:
    green = tmp_path / "test_green.py"
    green.write_text("def test_it():\n    pass\n")
    assert gate.why_red(str(green)) is None
    assert "exit code" in (gate.why_red(str(tmp_path / "test_missing.py")) or "")


def test_an_op_with_red_tests_gets_no_figure_and_the_run_fails(tmp_path: Path) -> None:
    (tmp_path / "test_red.py").write_text("def test_it():\n    assert False\n")
    program = (
        "import sys\n"
        "from benchmarks import measure\n"
        "from benchmarks.ops import bench_ops, cases\n"
        f"measure.ceilings = lambda device: {CEILINGS}\n"
        f"cases.Case.tests = property(lambda self: {str(tmp_path / 'test_red.py')!r})\n"
        "cases.CASES = tuple(case for case in cases.CASES if case.op == 'philox_normal')[:1]\n"
        f"sys.exit(bench_ops.main(['--results', {str(tmp_path)!r}]))"
    )
    done = run_python(program)
    assert done.returncode == 1 and "No figure for philox_normal" in done.stdout, done.stdout + done.stderr
    (path,) = tmp_path.glob("ops_*.json")
    kept = json.loads(path.read_text())
    assert kept["results"] == [] and "test_red.py" in kept["refused"][0]["reason"]


def test_every_case_names_an_op_and_a_file_of_tests_that_exist() -> None:
    for case in cases.CASES:
        assert case.op in OP_BACKENDS and (gate.REPOSITORY / case.tests).is_file()
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    with pytest.raises(ValueError, match="blur has no case; there are bilinear_upsample"):
        cases.cases_of(["blur"])


def test_the_job_is_measured_beside_the_bare_chain_of_the_same_images(capfd: pytest.CaptureFixture[str]) -> None:
    chain = ChainConfig(steps=1, step_size=0.1, potential="paper")
    job, bare = chains.measure("digits", chain, batch=2, blocks=3, rounds=2, plain=False, compile=False)
    assert (job["candidate"], bare["candidate"]) == (chains.JOB, chains.BARE)
    assert len(job["times_s"]) == 2 and bare["images_per_second"] == pytest.approx(6 / bare["median_s"])
    assert job["over_bare_chain"] == pytest.approx(bare["median_s"] / job["median_s"])
    assert job["whole_job_s"] > job["median_s"] and bare["whole_job_s"] is None
    assert capfd.readouterr().out.count("Made 6 images") == 3, "one round warms up"
    with pytest.raises(ValueError, match="digits has another potential"):
        chains.measure("digits", chain, batch=2, blocks=1, rounds=1, plain=True, compile=False)


def test_chains_of_a_pair_that_is_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_gradient = chains.true_gradient
    monkeypatch.setattr(chains, "true_gradient", lambda *arguments: 1.5 * true_gradient(*arguments))
    monkeypatch.setattr(chains, "_measure_group", lambda *arguments: pytest.fail("was timed"))
    with pytest.raises(ValueError, match="The gradients of the frozen pair and of the plain modules differ by 3.3e-01"):
        chains.measure("digits", ChainConfig(1, 1e-3), batch=2, blocks=1, rounds=1, plain=False, compile=False)


def test_gpu_stages_keep_what_became_of_each_and_go_on(tmp_path: Path) -> None:
    def stage(name: str, limit_s: float, *command: str, needs: tuple[str, ...] = ("build",)) -> gpu.Stage:
        return gpu.Stage(name, 1, limit_s, lambda sound: command, needs)

    def python(program: str) -> tuple[str, ...]:
        return (sys.executable, "-c", program)

    hanging = "import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-c', '{}'])"
    planned = [
        stage("build", 60, *python("print('built')"), needs=()),
        stage("tests", 60, *python("raise SystemExit(3)")),
        stage("memcheck", 3, *python(hanging.format("import time; time.sleep(60)"))),
        stage("racecheck", 60, "no-such-program"),
        stage("pair", 60, *python("print('measured')")),
    ]
    done = gpu.run_stages(planned, 300, tmp_path / "results" / "gpu_run.json", tmp_path / "logs")
    outcomes = [
        "passed",
        "exit code 3",
        "stopped after 3 s",
        "not run: no-such-program is not on this machine",
        "passed",
    ]
    assert [stage["outcome"] for stage in done] == outcomes
    assert done[0]["last_lines"] == ["built"] and done[2]["last_lines"] == ["on"]
    written = json.loads((tmp_path / "results" / "gpu_run.json").read_text())["stages"]
    assert written == [*(stage for stage in done if "seconds" in stage), done[3]], "what did not run comes last"


def test_nothing_that_needs_a_stage_follows_its_failure_nor_anything_the_end_of_the_time(tmp_path: Path) -> None:
    failing = gpu.Stage("build", 1, 60, lambda sound: (sys.executable, "-c", "raise SystemExit(1)"), needs=())
    profile = gpu.Stage("profile, cuda", 1, 60, lambda sound: (sys.executable, "-c", ""), ("build", "smoke, cuda"))
    done = gpu.run_stages([failing, profile], 300, tmp_path / "run.json", tmp_path)
    assert done[1] == {"stage": "profile, cuda", "outcome": "not run: it needs build and smoke, cuda"}
    late = gpu.run_stages([failing], 1, tmp_path / "run.json", tmp_path)
    assert late == [{"stage": "build", "outcome": "no time left"}]


def test_gpu_tests_are_found_without_tyro() -> None:
    arguments = ["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    program = f"import sys; sys.modules['tyro'] = None; import pytest; sys.exit(pytest.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "test_gpu.py" in done.stdout, done.stdout + done.stderr


def test_gpu_stages_need_what_comes_before_them_and_are_understood(tmp_path: Path) -> None:
    planned = gpu.stages(tmp_path)
    names = [stage.name for stage in planned]
    for index, stage in enumerate(planned):
        assert set(stage.needs) <= set(names[:index]), stage.name
    cases = [case for group in gpu.CASES for case in group]
    assert len(set(cases)) == len(cases) == 12 and set(gpu.COMPILED) <= set(cases)
    compiling = next(stage for stage in planned if stage.name == "pair, torch.compile")
    command = [*compiling.command(("triton", "cuda")), "--collect-only"]
    done = subprocess.run(command, cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and f"celeba_64-16-{NHWC}" in done.stdout, done.stdout + done.stderr


def test_only_what_this_run_measured_is_shown(tmp_path: Path) -> None:
    for name, changed in (
        ("pair_cuda", 200.0),
        ("pair_sizes_cuda", 100.0),
        ("ops_cuda", 200.0),
        ("training_cuda", 200.0),
        ("pair_cpu", 200.0),
    ):
        (tmp_path / f"{name}.json").touch()
        os.utime(tmp_path / f"{name}.json", (changed, changed))
    assert [path.stem for path in gpu.measured_since(150.0, tmp_path)] == ["ops_cuda", "pair_cuda", "training_cuda"]


def test_without_a_gpu_make_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_python("from benchmarks.gpu import stages; stages.main([])")
    assert done.returncode == 1 and "sees no GPU; `make gpu` needs one." in done.stderr


def test_the_runner_lists_benchmarks_by_their_questions_and_refuses_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run_python(
        "import sys; sys.modules['triton'] = None; from benchmarks import __main__ as m; print(m.usage())"
    )
    assert done.returncode == 0, done.stderr
    listed = done.stdout
    assert all(re.search(rf"^  {name} +\S.*[?.]$", listed, re.MULTILINE) for name in runner.MODULES), listed
    assert runner.main(["speed"]) == 2
    assert "No benchmark is named 'speed'; there are ops, pair" in capsys.readouterr().err


def test_the_runner_hands_options_on_and_gives_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "ops", "--collect-only", "--op", "philox_normal"]
    done = subprocess.run(command, cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "philox_normal" in done.stdout and "pointwise" not in done.stdout, done.stdout
    refused = subprocess.run([*command[:-2], "--op", "blur"], cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert refused.returncode != 0 and "blur has no case" in refused.stdout + refused.stderr
    shutil.copy(gate.REPOSITORY / "benchmarks" / "results" / "loaders_cpu.json", tmp_path)
    missing = str(tmp_path / "README.md")
    failed = subprocess.run(
        [*command[:3], "report", "--results", str(tmp_path), "--readme", missing],
        cwd=gate.REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 1 and failed.stderr == f"error: {missing}: No such file or directory.\n"
    helped = subprocess.run([*command[:3], "pair", "--help"], cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert "usage: python -m benchmarks pair" in helped.stdout and "--compile PRESET:N" in helped.stdout
    shown = subprocess.run([*command[:3], "training", "--help"], cwd=gate.REPOSITORY, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m benchmarks training")


def test_the_runner_is_a_command_like_any_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise UserError("Give a number.")

    monkeypatch.setattr(runner.importlib, "import_module", lambda _: SimpleNamespace(main=fails))
    assert runner.main(["report"]) == 1 and capsys.readouterr().err == "error: Give a number.\n"
    monkeypatch.setattr(runner, "usage", lambda: fails(None))
    assert runner.main(["--help"]) == 1
