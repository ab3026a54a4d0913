"""The stages of `make gpu` and the verdict on what they measured, without a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, pair, sampling, targets
from benchmarks.pair import COMPILED_BF16, PLAIN


def test_stages_put_chains_behind_the_pair_and_before_what_may_be_left_out(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    names = list(planned)
    assert names[:6] == ["build", "tests", "tests, cuda", "pair", "chain, celeba_256", "chain, celeba_64"]
    assert names.index("chain, celeba_256, torch.compile") > names.index("memcheck") and names[-1] == "tune"
    assert all(stage.limit_s <= 300 for stage in planned.values() if stage.name != "tune")
    passed = set(names)
    for words in (stage.words(passed) for stage in planned.values() if stage.name.startswith("pair")):
        candidates = [word.removeprefix("--candidate=") for word in words if word.startswith("--candidate=")]
        assert candidates and set(candidates) <= set(pair.CANDIDATES)
    for name in (name for name in names if name.startswith("chain")):
        options = sampling._parser().parse_args(planned[name].words(passed)[3:])
        assert (options.dtype, options.backend, options.batch) == ("bfloat16", "cuda", 16)
        assert (
            options.results == tmp_path and options.preset in name and options.compile == (name != "chain, celeba_256")
        )


def test_chains_run_on_the_backend_that_was_fastest_in_the_pair(tmp_path: Path) -> None:
    assert gpu.fastest_backend(tmp_path, "celeba_64") == "cuda"
    assert gpu.fastest_backend(tmp_path, "celeba_64", without="cuda") == "triton"
    rows = [
        step_row("frozen, cuda, bf16", 0.2, backend="cuda"),
        step_row("frozen, triton, bf16", 0.1, backend="triton"),
        step_row("frozen, triton", 0.01, backend="reference"),
        step_row("frozen, cuda, bf16", 0.05, backend="cuda", preset="celeba_64"),
    ]
    write(tmp_path, "pair_cuda", "A GPU", *rows)
    assert gpu.fastest_backend(tmp_path, "celeba_256") == "triton"
    assert gpu.fastest_backend(tmp_path, "celeba_64") == "cuda"
    assert gpu.fastest_backend(tmp_path, "celeba_64", without="cuda") == "triton"


def test_cuda_kernels_whose_tests_are_red_are_not_measured_and_triton_is(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in gpu.stages(tmp_path)}
    red, green = {"build", "tests"}, {"build", "tests", "tests, cuda"}
    for name in ("pair", "ops"):
        assert planned[name].words(red) == [*planned[name].words(green), "--without", "cuda"]
        assert planned[name].needs == ("build", "tests")
    assert planned["chain, celeba_64"].words(red)[-2:] == ["--backend", "triton"]
    assert planned["chain, celeba_64"].words(green)[-2:] == ["--backend", "cuda"]


def test_stages_by_name_bring_what_they_need(tmp_path: Path) -> None:
    planned = gpu.stages(tmp_path)

    def names(*asked: str, tested: bool = False) -> list[str]:
        return [stage.name for stage in gpu.chosen(planned, asked, tested=tested)]

    assert names() == [stage.name for stage in planned]
    assert names("tune", "memcheck") == ["build", "tests", "memcheck", "tune"]
    assert names("ops", tested=True) == ["build", "ops"] and "tests" not in names(tested=True)
    assert names("ops") == ["build", "tests", "tests, cuda", "ops"]
    with pytest.raises(ValueError, match="No stage is named dance; there are build; tests; tests, cuda; pair;"):
        names("dance")


def test_tests_that_passed_before_need_not_run_again(tmp_path: Path) -> None:
    said = (sys.executable, "-c", "import sys; print(sys.argv[1:])")
    stage = gpu.Stage("ops", said, 60, ("tests",), "tests, cuda", ("--without", "cuda"))
    (left,) = gpu.run_stages([stage], 60, tmp_path / "run.json")
    assert left["outcome"] == "not run: it needs tests"
    (one,) = gpu.run_stages([stage], 60, tmp_path / "run.json", ["tests"])
    assert one["last_lines"] == ["['--without', 'cuda']"]
    (both,) = gpu.run_stages([stage], 60, tmp_path / "run.json", gpu.TESTS)
    assert both["last_lines"] == ["[]"] and both["outcome"] == "passed"


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
        chain_row(sampling.BARE, 100.0),
        chain_row(PLAIN, 10.0, dtype="float32", launched="eager"),
        chain_row(COMPILED_BF16, 51.0),
        chain_row(sampling.COLD, 80.0),
        chain_row(sampling.JOB, 76.0),
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
