"""The stages of `make gpu` and the verdict on what they measured, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import report
from benchmarks.gpu import stages as gpu
from benchmarks.gpu import targets
from benchmarks.gpu.sources import digest_of_all
from benchmarks.step import chains, pair
from benchmarks.step.pair import COMPILED_BF16, PLAIN

BOTH = ("triton", "cuda")


def test_the_most_important_comes_first_and_what_follows_fits_the_budget(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    names = list(planned)
    plan = names[: names.index("tune") + 1]
    assert plan == [
        "build", "kernels", "smoke, triton", "smoke, cuda", "pair", "profile, cuda", "profile, triton", "tests",
        "chain, celeba_256", "chain, celeba_64", "ops", "memcheck", "racecheck", "tune",
    ]  # fmt: skip
    assert sum(planned[name].takes_s for name in plan) <= gpu.BUDGET_S == 500
    assert all(0 < stage.takes_s < stage.limit_s for stage in planned.values())
    assert all(stage.limit_s <= 300 for stage in planned.values() if stage.name != "tune")


def test_stages_measure_what_there_is(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    for words in (stage.command(BOTH) for stage in planned.values() if stage.name.startswith("pair")):
        candidates = [word.removeprefix("--candidate=") for word in words if word.startswith("--candidate=")]
        assert candidates and set(candidates) <= set(pair.CANDIDATES)
    for name in (name for name in planned if name.startswith("chain")):
        options = chains._parser().parse_args(list(planned[name].command(BOTH))[4:])
        assert (options.dtype, options.backend, options.batch) == ("bfloat16", "cuda", 16)
        assert options.results == tmp_path and options.preset in name
        assert options.compile == (name in ("chain, celeba_64", "chain, celeba_256, torch.compile"))
    for words in (stage.command(BOTH) for stage in planned.values()):
        if words[1:3] == ("-m", "benchmarks"):
            assert words[3] in runner.MODULES


def test_plain_pytorch_is_measured_before_kernels_that_may_end_the_process() -> None:
    kernels = [name for name in gpu.CANDIDATES if "cuda" in name or "triton" in name]
    assert gpu.CANDIDATES[-len(kernels) :] == tuple(kernels) and "frozen, reference, bf16" in gpu.CANDIDATES


@pytest.mark.parametrize(("tool", "fewest", "most"), [("memcheck", 60, 120), ("racecheck", 6, 20)])
def test_sanitisers_run_small_cases(tool: str, fewest: int, most: int, tmp_path: Path) -> None:
    (stage,) = (stage for stage in gpu.stages(tmp_path) if stage.name == tool)
    words = list(stage.command(BOTH))
    assert stage.variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} and words[:3] == [
        "compute-sanitizer",
        "--tool",
        tool,
    ]
    collected = subprocess.run(
        [*words[words.index(sys.executable) :], "--collect-only"],
        cwd=gpu.REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    tests = [line for line in collected.stdout.splitlines() if "::test_sanitised" in line]
    assert fewest <= len(tests) <= most
    if tool == "racecheck":
        assert {"cuda", "triton"} == {name for name in BOTH if any(name in test for test in tests)}
        for op in ("inverted_residual", "power_iteration", "se_gate_residual", "energy_head", "pointwise"):
            assert any(op in test for test in tests), op


def test_no_figure_needs_another_stage_but_profiles_need_their_backend(tmp_path: Path) -> None:
    """Without the compiled part, Triton and plain PyTorch are measured."""
    needs = {stage.name: stage.needs for stage in gpu.stages(tmp_path) if stage.needs}
    smoke = ("smoke, triton", "smoke, cuda")
    assert needs == {"smoke, cuda": ("build",), "profile, triton": smoke[:1], "profile, cuda": smoke}


def test_chains_run_on_the_sound_backend_that_was_fastest_in_the_pair(tmp_path: Path) -> None:
    assert gpu.fastest_backend(tmp_path, "celeba_64", BOTH) == "cuda"
    assert gpu.fastest_backend(tmp_path, "celeba_64", ["triton"]) == "triton"
    assert gpu.fastest_backend(tmp_path, "celeba_64", []) == "reference"
    rows = [
        step_row("frozen, cuda, bf16", 0.2, backend="cuda"),
        step_row("frozen, triton, bf16", 0.1, backend="triton"),
        step_row("frozen, triton", 0.01, backend="reference"),
    ]
    write(tmp_path, "pair_cuda", "A GPU", *rows)
    write(tmp_path, "pair_presets_cuda", "A GPU", step_row("frozen, cuda, bf16", 0.05, preset="celeba_64"))
    assert gpu.fastest_backend(tmp_path, "celeba_256", BOTH) == "triton"
    assert gpu.fastest_backend(tmp_path, "celeba_256", ["cuda"]) == "cuda"
    assert gpu.fastest_backend(tmp_path, "celeba_64", BOTH) == "cuda"
    assert gpu.fastest_backend(tmp_path, "celeba_64", ["triton"]) == "triton"


def test_backends_whose_smoke_tests_are_red_are_not_measured_and_the_others_are(tmp_path: Path) -> None:
    """A pair on cuda has Triton's kernels too; the ops on cuda have not."""
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}

    def without(name: str, *green: str) -> list[str]:
        return [word for word in planned[name].command(green) if word.startswith("--without")]

    for name in ("pair", "ops"):
        assert without(name, *BOTH) == [] and without(name, "triton") == ["--without=cuda"]
        assert without(name) == ["--without=triton", "--without=cuda"]
    assert without("ops", "cuda") == ["--without=triton"]
    assert without("pair", "cuda") == ["--without=triton", "--without=cuda"]
    chain = planned["chain, celeba_256"].command
    assert [chain(green)[-1] for green in (BOTH, ["triton"], ["cuda"])] == ["cuda", "triton", "reference"]


def test_a_red_stage_withholds_only_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(sound: Any) -> list[str]:
        return [sys.executable, "-c", f"print({list(sound)!r})"]

    def smoke(sound: Any) -> list[str]:
        return [sys.executable, "-c", "print('3 passed, 2 skipped in 1s')"]

    def fail(sound: Any) -> list[str]:
        return [sys.executable, "-c", "print('FAILED tests/test_a.py::test_b[c d] - no'); raise SystemExit(3)"]

    def outcomes(red: str) -> dict[str, Any]:
        planned = [
            gpu.Stage("smoke, triton", 1, 60, fail if red == "smoke, triton" else smoke, ()),
            gpu.Stage("smoke, cuda", 1, 60, fail if red == "smoke, cuda" else smoke, ()),
            gpu.Stage("tests", 1, 60, fail, ()),
            gpu.Stage("figures", 1, 60, say, ()),
            gpu.Stage("profile", 1, 60, say, ("smoke, cuda",)),
        ]
        return {done["stage"]: done for done in gpu.run_stages(planned, 60, tmp_path / "run.json", tmp_path / "logs")}

    found = outcomes("none")
    assert found["tests"]["outcome"] == "exit code 3" and found["figures"]["last_lines"] == ["['triton', 'cuda']"]
    assert (tmp_path / "logs" / "tests.log").read_text() == "FAILED tests/test_a.py::test_b[c d] - no\n"
    assert found["tests"]["red"] == ["tests/test_a.py::test_b[c d]"] and "red" not in found["figures"]
    assert (
        f"  FAILED tests/test_a.py::test_b[c d] - no\n  see {tmp_path / 'logs' / 'tests.log'}\n"
        in capsys.readouterr().out
    )
    found = outcomes("smoke, cuda")
    assert found["figures"]["last_lines"] == ["['triton']"] and found["tests"]["green"] == ["triton"]
    assert found["profile"]["outcome"] == "not run: it needs smoke, cuda"
    assert outcomes("smoke, triton")["figures"]["last_lines"] == ["['cuda']"]


def test_stages_by_name_come_after_the_build_and_the_smoke_tests(tmp_path: Path) -> None:
    planned = gpu.stages(tmp_path)

    def names(*asked: str) -> list[str]:
        return [stage.name for stage in gpu.chosen(planned, asked)]

    always = ["build", "kernels", "smoke, triton", "smoke, cuda"]
    assert names() == [stage.name for stage in planned]
    assert names("tune", "memcheck") == [*always, "memcheck", "tune"]
    assert planned[7].name == "tests" and planned[7].limit_s > 3 * planned[7].takes_s, "without it nothing is recorded"
    for name in ("pair", "ops", "pair, float32"):
        assert sorted(names(name)) == sorted([*always, "tests", name]), "figures that count"
    with pytest.raises(
        ValueError, match="No stage is named dance; there are build; kernels; smoke, triton; smoke, cuda; pair;"
    ):
        names("dance")


def test_tables_of_chains_are_shown_too(tmp_path: Path) -> None:
    for name in ("pair_cuda", "chain_celeba_64_16_bf16_cuda", "chain_celeba_64_4_cpu"):
        (tmp_path / f"{name}.json").touch()
    assert [path.stem for path in gpu.measured_since(0, tmp_path)] == [
        "chain_celeba_64_16_bf16_cuda",
        "pair_cuda",
    ]
    os.utime(tmp_path / "pair_cuda.json", (100.0, 100.0))
    assert len(gpu.measured_since(150.0, tmp_path)) == 1


def test_each_stage_says_what_it_takes_and_a_smaller_budget_cuts_from_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(sound: Any) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    planned = [gpu.Stage(name, takes_s, 40, sleep, ()) for name, takes_s in (("first", 7), ("second", 8))]
    (own_limit,) = gpu.run_stages([gpu.Stage("a", 1, 1, sleep)], 60, tmp_path / "run.json", tmp_path / "logs")
    assert own_limit["outcome"] == "stopped after 1 s"
    first, second = gpu.run_stages(planned, 6, tmp_path / "other.json", tmp_path / "logs")
    assert first["outcome"] == "no time left, stopped after 6 s" and second["outcome"] == "no time left"
    out = capsys.readouterr().out
    assert (
        "first: about 7 s, at most 6 of 6 s\nfirst: no time left, stopped after 6 s, 6 s\n" in out
        and "second: no time left" in out
    )


def test_what_a_stopped_stage_has_started_ends_with_it(tmp_path: Path) -> None:
    """Such as compilers, or what a sanitiser runs."""
    program = (
        "import subprocess; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
    )
    (stopped,) = gpu.run_stages(
        [gpu.Stage("a", 1, 2, lambda green: [sys.executable, "-c", program])], 60, tmp_path / "run.json", tmp_path
    )
    assert stopped["outcome"] == "stopped after 2 s"
    state, ends = Path(f"/proc/{stopped['last_lines'][0]}/stat"), time.monotonic() + 60
    with suppress(FileNotFoundError):
        while state.read_text().rpartition(")")[2].split()[0] != "Z":  # which has ended, and waits for init
            assert time.monotonic() < ends, "it runs on"
            time.sleep(0.05)


def test_stages_share_tritons_cache_with_the_kit(tmp_path: Path) -> None:
    def say(sound: Any) -> list[str]:
        return [sys.executable, "-c", "import os; print(os.environ['TRITON_CACHE_DIR'], os.environ.get('OWN'))"]

    planned = [gpu.Stage("a", 1, 60, say), gpu.Stage("b", 1, 60, say, variables={"OWN": "1"})]
    first, second = gpu.run_stages(planned, 60, tmp_path / "run.json", tmp_path / "logs")
    assert first["last_lines"] == [f"{gpu.TRITON_CACHE} None"] and second["last_lines"] == [f"{gpu.TRITON_CACHE} 1"]


def test_a_second_run_keeps_what_the_first_found_of_other_stages(tmp_path: Path) -> None:
    def say(sound: Any) -> list[str]:
        return [sys.executable, "-c", ""]

    def run(budget_s: float, *names: str) -> list[tuple[str, str]]:
        planned = [gpu.Stage(name, 1, 60, say) for name in names]
        gpu.run_stages(planned, budget_s, tmp_path / "run.json", tmp_path / "logs")
        stages = json.loads((tmp_path / "run.json").read_text())["stages"]
        return [(entry["stage"], entry["outcome"]) for entry in stages]

    assert run(60, "a", "b") == [("a", "passed"), ("b", "passed")]
    assert all("commit" in entry for entry in json.loads((tmp_path / "run.json").read_text())["stages"])
    assert run(1, "b", "c") == [("a", "passed"), ("b", "passed"), ("c", gpu.NO_TIME)]
    assert run(60, "c") == [("a", "passed"), ("b", "passed"), ("c", "passed")]
    content = json.loads((tmp_path / "run.json").read_text())
    assert {entry["kernels"] for entry in content["stages"]} == {digest_of_all()}
    here = content["environment"]["device"]
    content["stages"] = [{**entry, "device": "Another GPU"} for entry in content["stages"]]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert run(60, "b") == [("a", "passed"), ("b", "passed"), ("c", "passed"), ("b", "passed")]
    stages = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert [entry["device"] for entry in stages] == [*["Another GPU"] * 3, here]


def test_what_was_red_stays_so_until_the_stage_has_ended_again(tmp_path: Path) -> None:
    def red(program: str, limit_s: float = 60) -> list[str] | None:
        stage = gpu.Stage("tests", 0.1, limit_s, lambda green: [sys.executable, "-c", program])
        (entry,) = gpu.run_stages([stage], 60, tmp_path / "run.json", tmp_path / "logs")
        assert json.loads((tmp_path / "run.json").read_text())["stages"] == [entry]
        return entry.get("red")

    fails = "print('FAILED tests/test_a.py::{0} - no', flush=True); "
    assert red(fails.format("test_a") + "raise SystemExit(1)") == ["tests/test_a.py::test_a"]
    stopped = ["tests/test_a.py::test_a", "tests/test_a.py::test_b"]
    assert red(fails.format("test_b") + "import time; time.sleep(60)", 1) == stopped
    for end in ("raise SystemExit(1)", "raise SystemExit(-9)", "raise SystemExit(139)", "raise SystemExit(5)"):
        assert set(stopped) < set(red(end) or ()), "no test was run"
    assert not json.loads((tmp_path / "run.json").read_text())["stages"][0]["ended"]
    assert red(fails.format("test_c") + "raise SystemExit(1)") == ["tests/test_a.py::test_c"]
    assert json.loads((tmp_path / "run.json").read_text())["stages"][0]["ended"]
    assert red("") is None


def test_a_sanitiser_that_finds_an_error_is_red_beside_red_tests(tmp_path: Path) -> None:
    program = "print('FAILED tests/test_a.py::test_a - no'); raise SystemExit(9)"
    stages = [
        gpu.Stage(name, 1, 60, lambda green: [sys.executable, "-c", program]) for name in ("memcheck", "racecheck")
    ]
    done = gpu.run_stages(stages, 60, tmp_path / "run.json", tmp_path / "logs")
    assert [entry["red"] for entry in done] == [
        ["tests/test_a.py::test_a", f"{name} (exit code 9)"] for name in ("memcheck", "racecheck")
    ]


def test_smoke_tests_that_were_all_skipped_have_not_passed(tmp_path: Path) -> None:
    def of(text: str) -> gpu.Stage:
        return gpu.Stage("smoke, cuda", 1, 60, lambda green: [sys.executable, "-c", f"print({text!r}, end='')"])

    for text, outcome in (
        ("7 passed, 3 skipped in 2s", "passed"),
        ("7 passed in 2s\n[W1127 ProcessGroup] leaked", "passed"),
        ("10 passed in 2s", "passed"),
        ("0 passed, 3 skipped in 2s", gpu.ALL_SKIPPED),
        ("9 skipped, 3 deselected in 2s", gpu.ALL_SKIPPED),
        ("", gpu.ALL_SKIPPED),
    ):
        needs = gpu.Stage("profile", 1, 60, lambda green: [sys.executable, "-c", ""], ("smoke, cuda",))
        smoke, after = gpu.run_stages([of(text), needs], 60, tmp_path / "run.json", tmp_path / "logs")
        assert smoke.get("red", []) == [f"smoke, cuda ({outcome})"] * (outcome != "passed")
        assert smoke["outcome"] == outcome and (after["outcome"] == "passed") == (outcome == "passed")


@pytest.mark.parametrize(
    ("outcome", "red", "code"),
    [
        ("passed", [], 0),
        (gpu.NO_TIME, [], 0),
        ("no time left, stopped after 9 s", [], 0),
        ("no time left, stopped after 9 s", ["tests/test_a.py::test_b"], 1),
        ("not run: compute-sanitizer is not on this machine", [], 0),
        ("not run: it needs smoke, cuda", [], 1),
        ("exit code 1", [], 1),
        ("stopped after 60 s", [], 1),
        (gpu.ALL_SKIPPED, [], 1),
    ],
)
def test_the_exit_code_is_of_what_there_was_time_for(
    outcome: str, red: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run_stages(*_: Any) -> list[dict[str, Any]]:
        numbers = (
            "rounds p20_s p80_s flops bytes memory_before_mib peak_memory_mib user_s system_s page_faults compile_s"
        )
        row = step_row("frozen, cuda, bf16", 0.1, **dict.fromkeys(numbers.split(), 1.0))
        write(tmp_path, "pair_cuda", "A GPU", row)
        return [{"stage": "tests", "outcome": outcome, "red": red}]

    monkeypatch.setattr(gpu, "run_stages", run_stages)
    recorded: list[Any] = []
    monkeypatch.setattr(gpu.measured, "record", lambda *given: recorded.append(given))
    assert gpu.main(["--results", str(tmp_path)]) == code
    assert json.loads((tmp_path / "pair_cuda.json").read_text()).get("red", []) == red
    assert recorded == [(tmp_path,)]


def test_what_a_stage_would_miss_is_said_before_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("json", "no_such_module"))
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "has no no_such_module; install them, or name another: GPU_PYTHON=" in capsys.readouterr().err


def test_stages_of_tests_that_name_no_red_test_are_red_as_a_whole(tmp_path: Path) -> None:
    def fail(sound: Any) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit(9)"]

    planned = [
        gpu.Stage("memcheck", 1, 60, fail),
        gpu.Stage("ops", 1, 60, fail),
        gpu.Stage("racecheck", 1, 60, lambda green: ["no-such-sanitizer"]),
        gpu.Stage("tests", 1, 60, lambda green: [sys.executable, "-c", ""]),
    ]
    done = gpu.run_stages(planned, 60, tmp_path / "run.json", tmp_path / "logs")
    assert [stage.get("red") for stage in done] == [["memcheck (exit code 9)"], None, None, None]
    assert done[2]["outcome"] == "not run: no-such-sanitizer is not on this machine"
    written = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert sorted(written, key=lambda stage: stage["stage"]) == sorted(done, key=lambda stage: stage["stage"])


@pytest.mark.parametrize("budget", ["0", "-5", "inf", "nan", "soon"])
def test_a_budget_is_a_time(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([f"--budget={budget}"])
    assert f"{budget} is no time to spend; name seconds" in capsys.readouterr().err


def test_tables_say_which_tests_were_red_until_none_is(tmp_path: Path) -> None:
    write(tmp_path, "pair_cuda", "A GPU", step_row("frozen, cuda, bf16", 0.1, rounds=5, p20_s=0.1, p80_s=0.1))
    path = tmp_path / "pair_cuda.json"
    gpu.mark([path], ["tests/test_a.py::test_b"])
    assert "Red in the same run: tests/test_a.py::test_b." in report.describe(json.loads(path.read_text()))
    gpu.mark([path], [])
    assert "Red" not in report.describe(json.loads(path.read_text()))


def content(gpu_name: str, *rows: pair.Row) -> dict[str, Any]:
    where = {"device": gpu_name, "device_type": "cuda", "commit": "abc"}
    ceilings = {"matrix_gflops": 1e5, "copy_gbps": 3e3}
    return {"question": "How long?", "environment": where, "ceilings": ceilings, "results": list(rows), "refused": []}


def write(folder: Path, name: str, gpu_name: str, *rows: pair.Row) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content(gpu_name, *rows)))


def step_row(candidate: str, median_s: float, **others: Any) -> pair.Row:
    dtype = "bfloat16" if "bf16" in candidate else "float32"
    facts = {"preset": "celeba_256", "batch": 16, "backend": "cuda", "launched": "CUDA graph", "dtype": dtype}
    return {**facts, "candidate": candidate, "median_s": median_s, **others}


def chain_row(candidate: str, images_per_second: float, **others: Any) -> pair.Row:
    return step_row(candidate, 1.0, steps=20, images_per_second=images_per_second, **{"dtype": "bfloat16", **others})


def lines(folder: Path) -> dict[str, tuple[str, str]]:
    """Measured and holds, by target."""
    cells = [[cell.strip() for cell in line.split("|")] for line in targets.verdict(folder).splitlines() if "|" in line]
    return {row[1]: (row[3], row[4]) for row in cells[2:]}


def test_the_verdict_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    assert "nothing was measured" in targets.verdict(tmp_path)
    fast = "frozen, triton, bf16"
    write(
        tmp_path, "pair_cuda", "NVIDIA H100 80GB HBM3",
        step_row(fast, 16 * 0.6e-3, backend="triton"), step_row("frozen, cuda, bf16", 1.0),
        step_row(PLAIN, 16 * 5.9e-3), step_row(COMPILED_BF16, 0.001, batch=1), step_row(fast, 1e-6, batch=1),
        step_row("frozen, triton", 1e-6),
    )  # fmt: skip
    found = lines(tmp_path)
    assert found["celeba_256, step, per image"] == ("0.6 ms (frozen, triton, bf16, triton, N = 16)", "yes")
    assert found["celeba_256, step, over the plain modules"] == ("9.83x (frozen, triton, bf16, triton, N = 16)", "no")
    left = {name for name, cells in found.items() if cells == ("not measured", "not measured")}
    assert len(left) == len(found) - 2 and "celeba_256, step, over torch.compile" in left


def test_the_verdict_on_chains_and_jobs(tmp_path: Path) -> None:
    rows = [
        chain_row(chains.BARE, 100.0),
        chain_row(PLAIN, 10.0, dtype="float32", launched="eager"),
        chain_row(COMPILED_BF16, 51.0),
        chain_row(chains.COLD, 80.0),
        chain_row(chains.JOB, 76.0),
    ]
    write(tmp_path, "chain_celeba_256_16_bf16_cuda", "NVIDIA A100-SXM4-80GB", *rows)
    found = lines(tmp_path)
    ran = "(bare chain, frozen, cuda, N = 16)"
    assert found["celeba_256, chain, per image and step"] == (f"0.5 ms {ran}", "yes")
    assert found["celeba_256, chain, over the plain modules"] == (f"10x {ran}", "yes")
    assert found["celeba_256, chain, over torch.compile"] == (f"1.96x {ran}", "no")
    assert found["celeba_256, sampling job over bare chain"] == ("0.95x (sampling job, cuda, N = 16)", "yes")
    assert "<= 1.8 ms" in targets.verdict(tmp_path)


def test_a_ratio_of_two_runs_is_none_and_each_gpu_has_a_table(tmp_path: Path) -> None:
    write(tmp_path, "pair_cuda", "NVIDIA H200", step_row("frozen, cuda, bf16", 0.1, launched="eager: no"))
    write(tmp_path, "pair_compiled_cuda", "NVIDIA H200", step_row(PLAIN, 2.0))
    found = lines(tmp_path)
    assert found["celeba_256, step, over the plain modules"][0] == "not measured"
    assert found["celeba_256, step, per image"][0].endswith("N = 16, not captured)")
    write(tmp_path, "chain_celeba_64_16_bf16_cuda", "NVIDIA L4")
    text = targets.verdict(tmp_path)
    assert "NVIDIA H200, commit abc" in text and text.count("| target |") == 2
    assert "ms" not in text[text.index("NVIDIA L4") :], "the design names no time for it"
