"""The stages of `make gpu` and the verdict on what they measured, without a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import stages as gpu
from benchmarks.gpu import targets
from benchmarks.step import chains, pair
from benchmarks.step.pair import COMPILED_BF16, PLAIN

BOTH = ("triton", "cuda")


def test_the_most_important_comes_first_and_the_plan_fits_its_time(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    names = list(planned)
    assert names[:4] == ["build", "smoke, triton", "smoke, cuda", "pair"]
    assert names.index("profile, cuda") < names.index("chain, celeba_256") < names.index("tests") < names.index("ops")
    assert names.index("chain, celeba_256, torch.compile") > names.index("memcheck") and names[-1] == "tune"
    assert all(stage.limit_s <= 300 for stage in planned.values() if stage.name != "tune")
    for words in (stage.command(BOTH) for stage in planned.values() if stage.name.startswith("pair")):
        candidates = [word.removeprefix("--candidate=") for word in words if word.startswith("--candidate=")]
        assert candidates and set(candidates) <= set(pair.CANDIDATES)
    for name in (name for name in names if name.startswith("chain")):
        options = chains._parser().parse_args(list(planned[name].command(BOTH))[4:])
        assert (options.dtype, options.backend, options.batch) == ("bfloat16", "cuda", 16)
        assert (
            options.results == tmp_path and options.preset in name and options.compile == (name != "chain, celeba_256")
        )


def test_no_figure_needs_more_than_the_build_but_profiles_need_their_backend(tmp_path: Path) -> None:
    for stage in gpu.stages(tmp_path):
        if stage.name.startswith("profile"):
            assert stage.needs == ("build", stage.name.replace("profile", "smoke"))
        elif stage.name != "build":
            assert stage.needs == ("build",)


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
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    for name in ("pair", "ops"):
        every, one, none = (list(planned[name].command(sound)) for sound in (BOTH, ["triton"], []))
        assert one == [*every, "--without=cuda"] and none == [*every, "--without=triton", "--without=cuda"]


def test_a_red_stage_withholds_only_what_needs_it(tmp_path: Path) -> None:
    def say(sound: Any) -> list[str]:
        return [sys.executable, "-c", f"print({list(sound)!r})"]

    def fail(sound: Any) -> list[str]:
        return [sys.executable, "-c", "print('what was wrong'); raise SystemExit(3)"]

    def outcomes(red: str) -> dict[str, Any]:
        planned = [
            gpu.Stage("smoke, triton", fail if red == "smoke, triton" else say, 60, ()),
            gpu.Stage("smoke, cuda", fail if red == "smoke, cuda" else say, 60, ()),
            gpu.Stage("tests", fail, 60, ()),
            gpu.Stage("figures", say, 60, ()),
            gpu.Stage("profile", say, 60, ("smoke, cuda",)),
        ]
        return {done["stage"]: done for done in gpu.run_stages(planned, 60, tmp_path / "run.json", tmp_path / "logs")}

    found = outcomes("none")
    assert found["tests"]["outcome"] == "exit code 3" and found["figures"]["last_lines"] == ["['triton', 'cuda']"]
    assert (tmp_path / "logs" / "tests.log").read_text() == "what was wrong\n"
    found = outcomes("smoke, cuda")
    assert found["figures"]["last_lines"] == ["['triton']"]
    assert found["profile"]["outcome"] == "not run: it needs smoke, cuda"
    assert outcomes("smoke, triton")["figures"]["last_lines"] == ["[]"], "a pair on cuda has Triton's kernels too"


def test_stages_by_name_come_after_the_build_and_the_smoke_tests(tmp_path: Path) -> None:
    planned = gpu.stages(tmp_path)

    def names(*asked: str) -> list[str]:
        return [stage.name for stage in gpu.chosen(planned, asked)]

    always = ["build", "smoke, triton", "smoke, cuda"]
    assert names() == [stage.name for stage in planned]
    assert names("tune", "memcheck") == [*always, "memcheck", "tune"]
    with pytest.raises(ValueError, match="No stage is named dance; there are build; smoke, triton; smoke, cuda; pair;"):
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
