"""The tuner of the Triton kernels without a GPU: launches are noted instead of run, and a clock of ours times them."""

from __future__ import annotations

import math
import re
import shutil
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import vaebm_fast
from benchmarks.gpu import precompile, tune
from benchmarks.gpu.launches import recorded_launches
from benchmarks.gpu.tune import BEGIN, END, TUNERS, Calls, Tuner, write_table

META = torch.device("meta")
SOURCES = sorted((Path(vaebm_fast.__file__).parent / "triton_kernels").glob("*.py"))


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test tunes are copies."""
    for tuner in TUNERS.values():
        monkeypatch.setattr(tuner.module, tuner.table, dict(table_of(tuner)))


def table_of(tuner: Tuner) -> dict[Any, Any]:
    return getattr(tuner.module, tuner.table)


def is_used(candidate: Any, calls: Calls) -> bool:
    """Whether every call launches a kernel with this candidate's constants, or, of a flag, that stores swish(h2)."""
    used = []
    for call in calls:
        with recorded_launches() as launches:
            call()
        if isinstance(candidate, bool):
            depthwise = next(launch for launch in launches if launch.kernel.__name__ == "depthwise_kernel")
            used.append((depthwise.args[5] is not None) == candidate)
        else:
            used.append(any(candidate._asdict().items() <= launch.kwargs.items() for launch in launches))
    assert len(set(used)) == 1
    return used[0]


def tune_for(tuner: Tuner, favourite: Any) -> None:
    """Tune by a clock that finds `favourite` twice as fast as everything else."""
    tune.tune(tuner, lambda calls: 1.0 if is_used(favourite, calls) else 2.0, META, all_precisions=True)


@pytest.mark.parametrize("name", TUNERS)
def test_the_fastest_candidate_wins_at_the_shapes_of_a_model(name: str) -> None:
    tuner = TUNERS[name]
    before = dict(table_of(tuner))
    for favourite in (tuner.candidates[len(tuner.candidates) // 2], tuner.candidates[0]):
        tune_for(tuner, favourite)
        after = table_of(tuner)
        assert list(after) == list(before)
        tuned = {key for key in before if name != "depthwise_swish" or key[0] == 5}
        assert all(after[key] == (favourite if key in tuned else before[key]) for key in before)


@pytest.mark.parametrize("name", TUNERS)
def test_a_slower_or_hardly_faster_candidate_does_not(name: str) -> None:
    tuner = TUNERS[name]
    before = dict(table_of(tuner))
    tune.tune(
        tuner,
        lambda calls: 1.0 if any(table_of(tuner)[key] != before[key] for key in before) else 1.01,
        META,
        all_precisions=True,
    )
    assert table_of(tuner) == before


@pytest.mark.parametrize("name", TUNERS)
def test_the_table_is_written_between_its_marks_alone(name: str, tmp_path: Path) -> None:
    tuner, copy = TUNERS[name], tmp_path / f"{name}.py"
    source = Path(tuner.module.__file__)
    shutil.copy(source, copy)
    write_table(tuner, "Timed on a clock.", copy)
    lines, written = (path.read_text(encoding="utf-8").splitlines() for path in (source, copy))
    changed = [(a, b) for a, b in zip(lines, written, strict=True) if a.removesuffix("  # not timed") != b]
    assert [b for _, b in changed] == ["    # Timed on a clock."]  # entries are spelled as the source spells them

    tune_for(tuner, tuner.candidates[-1])
    write_table(tuner, "Timed on a clock.", copy)
    first = copy.read_bytes()
    write_table(tuner, "Timed on a clock.", copy)
    assert copy.read_bytes() == first
    read: dict[str, Any] = {"__name__": tuner.module.__name__}
    exec(compile(first, str(copy), "exec"), read)
    assert read[tuner.table] == table_of(tuner) and len(first.splitlines()) == len(lines)


@pytest.mark.parametrize("name", TUNERS)
def test_entries_that_a_run_did_not_come_to_are_marked(name: str, tmp_path: Path) -> None:
    tuner, copy = TUNERS[name], tmp_path / f"{name}.py"
    shutil.copy(Path(tuner.module.__file__), copy)
    first = next(iter(table_of(tuner)))
    write_table(tuner, "Timed on a clock.", copy, [first])
    text = copy.read_text(encoding="utf-8")
    assert text.count("),  # not timed\n") + text.count("e,  # not timed\n") == len(table_of(tuner)) - 1
    assert "# not timed" not in next(
        line for line in text.splitlines() if line.startswith(f"    {first!r}".replace("'", '"'))
    )
    write_table(tuner, "Timed on a clock.", copy)
    assert "# not timed" not in copy.read_text(encoding="utf-8") and not list(tmp_path.glob("*.new"))


def test_a_file_without_marks_is_left_alone(tmp_path: Path) -> None:
    tuner, copy = TUNERS["pointwise"], tmp_path / "pointwise.py"
    text = Path(tuner.module.__file__).read_text(encoding="utf-8")
    for broken in (text.replace(f"{END} CONFIGS", ""), 2 * text):
        copy.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="must hold '# tune_triton: begin CONFIGS' and behind it"):
            write_table(tuner, "Timed on a clock.", copy)
        assert copy.read_text(encoding="utf-8") == broken


def test_every_table_of_a_kernel_has_a_tuner() -> None:
    marked, tables = set(), set()
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        marked |= {(source.stem, name) for name in re.findall(rf"^    {BEGIN} (\w+)$", text, re.MULTILINE)}
        tables |= {(source.stem, name) for name in re.findall(r"^(CONFIGS|STORES_\w+)\b.*= {$", text, re.MULTILINE)}
    tuned = {(tuner.module.__name__.rpartition(".")[2], tuner.table) for tuner in TUNERS.values()}
    assert marked == tables == tuned


def test_a_candidate_that_a_gpu_cannot_hold_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(call: Any, **options: Any) -> float:
        call()
        return 1.0

    def too_large() -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune.triton.testing, "do_bench", do_bench)
    assert tune.time_ms([lambda: None, lambda: None]) == 2.0
    assert tune.time_ms([lambda: None, too_large]) == float("inf")


def test_a_candidate_with_other_results_loses() -> None:
    x, state = torch.linspace(-4, 4, 9), {"change": 0.0, "fails": False}

    def first() -> Any:
        if state["fails"]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return x, None

    def second() -> Any:
        y = x.clone()
        y[3] += state["change"]
        return y

    clock = tune.with_equal_results(lambda calls: 1.0)
    calls: Calls = [first, second]
    for change, time in ((0.0, 1.0), (0.07, 1.0), (0.09, inf), (math.nan, inf), (-0.07, 1.0), (-0.09, inf)):
        state["change"] = change
        assert clock(calls) == time, change
    state["fails"] = True
    assert clock(calls) == inf
    other = list(calls)
    assert clock(other) == inf
    state["fails"] = False
    assert clock(other) == inf, "there is nothing to compare with"
    state |= {"change": 2.0, "fails": False}
    assert clock(list(calls)) == 1.0, "another entry has its own"


@pytest.mark.parametrize(
    ("words", "sentence"), [(["pixel_head"], "pixel_head has no table; there are depthwise"), ([], "CUDA device")]
)
def test_what_cannot_be_tuned_is_said(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(words)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("all_precisions", [False, True])
def test_the_command_tunes_and_writes_every_table(all_precisions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end but for the GPU, its clock, its compiler, and the sources."""
    compiled: list[list[str]] = []
    monkeypatch.setattr(tune.subprocess, "run", lambda command, **how: compiled.append(command))
    written: dict[str, str] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch, "device", lambda kind: META)
    checked: list[Any] = []
    monkeypatch.setattr(tune, "time_ms", lambda calls: 1.0)
    monkeypatch.setattr(tune, "with_equal_results", lambda clock: checked.append(clock) or clock)
    timed: dict[str, list[Any]] = {}

    def write(tuner: Tuner, on: str, source: None, keys: list[Any]) -> None:
        written[tuner.module.__name__] = on
        timed.setdefault(tuner.table + tuner.module.__name__, []).append(list(keys))

    monkeypatch.setattr(tune, "write_table", write)
    tune.main(["--all"] if all_precisions else [])
    (command,) = compiled
    assert len(checked) == len(TUNERS)
    parts = [f"--for=tune {name}{', all' if all_precisions else ''}" for name in TUNERS]
    assert command[1:] == ["-m", "benchmarks", "precompile", *parts] and set(parts) <= {
        f"--for={part}" for part in precompile.TUNED
    }
    assert [name.rpartition(".")[2] for name in written] == list(TUNERS)
    assert all(on.startswith("Timed on an H200, torch ") for on in written.values())
    for so_far in timed.values():  # after every entry, and those in which chains run first
        assert [len(keys) for keys in so_far] == list(range(1, len(so_far) + 1))
        is_half = [key[-1] in tune.HALF for key in so_far[-1]]
        assert is_half == sorted(is_half, reverse=True) and set(is_half) == {True, not all_precisions}
