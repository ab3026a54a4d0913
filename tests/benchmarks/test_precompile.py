"""Kernels compiled before they are launched: that they are the ones that are launched, and what is carried where."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import knobs
from triton.runtime.driver import driver

from benchmarks import training
from benchmarks.gpu import kit, launches, precompile, stages, tune
from benchmarks.gpu.launches import Launch, launches_of, recorded_launches
from benchmarks.ops import cases
from tests.helpers.frozen_pairs import TINY, build
from vaebm_fast.config import NVAEConfig
from vaebm_fast.ops import _backend


def specialisations(found: list[Launch]) -> set[tuple[object, ...]]:
    return {launch.specialisation for launch in found}


def test_launches_recorded_on_the_meta_device_are_those_of_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which Triton specialises for addresses: noise views begin anywhere."""
    monkeypatch.setattr(_backend, "why_not", lambda op, device, backend: None)
    config = NVAEConfig(**TINY | {"image_size": 12})
    model = build(config)
    layout = model.noise_layout
    assert any(eps.data_ptr() % 16 for eps in layout.split(torch.zeros(2, layout.dim))[0])
    pair = model.freeze(torch.float32, "triton")
    real = launches_of(lambda: pair.potential_and_grad(*layout.split(torch.randn(2, layout.dim)), "official"))
    on_meta = build(config).to("meta").freeze(torch.float32, "triton")
    noise = torch.empty(2, layout.dim, device="meta")
    recorded = launches_of(lambda: on_meta.potential_and_grad(*layout.split(noise), "official"))
    assert len(real) > 30 and specialisations(real) == specialisations(recorded)


def test_a_specialisation_is_kernel_types_alignments_and_constants() -> None:
    from vaebm_fast.triton_kernels.pointwise import pointwise_kernel as kernel

    aligned = torch.empty(4)

    def launch(x: Any = aligned, inner: int = 64, images: int = 3) -> Launch:
        return Launch(kernel, (x, images), {"INNER": inner, "num_warps": 4})

    same = launch().specialisation
    assert launch(torch.empty(8)).specialisation == same and launch(images=5).specialisation == same
    others = [launch(torch.empty(5)[1:]), launch(torch.empty(4).bfloat16()), launch(None), launch(inner=128), launch(images=16), launch(images=1)]  # fmt: skip # noqa: E501
    assert len({same, *(other.specialisation for other in others)}) == 1 + len(others)


def test_every_stage_has_its_launches() -> None:
    smoke = {launch.kernel.__name__ for launch in precompile.recorded(["smoke"])[0]}
    pair = [launch.kernel.__name__ for launch in precompile.recorded(["pair"])[0]]
    assert {"depthwise_kernel", "pointwise_kernel", "head_kernel"} <= smoke, smoke
    stored = [
        arg.dtype for launch in precompile.recorded(["pair"])[0] for arg in launch.args if isinstance(arg, torch.Tensor)
    ]
    assert stored.count(torch.bfloat16) > len(stored) / 2
    assert len(pair) > 100 and {"depthwise_kernel", "pointwise_kernel"} <= set(pair)
    ops = {case.op for case in (*cases.SMALL_CASES, *cases.GPU_CASES)}
    assert ops >= {op for op, backends in _backend.OP_BACKENDS.items() if "triton" in backends} - {"philox_words"}


@pytest.mark.parametrize("all_precisions", [False, True])
def test_what_tune_times_is_compiled_before_and_the_tables_are_as_they_were(all_precisions: bool) -> None:
    before = {name: dict(getattr(tuner.module, tuner.table)) for name, tuner in tune.TUNERS.items()}
    for name, tuner in tune.TUNERS.items():
        assert 2 <= len(set(tuner.candidates)) == len(tuner.candidates) <= 12
        compiled, _ = precompile.recorded([f"tune {name}{', all' if all_precisions else ''}"])
        timed: list[Launch] = []

        def clock(calls: tune.Calls, timed: list[Launch] = timed) -> float:
            with recorded_launches() as made:
                for call in calls:
                    call()
            timed += made
            return 1.0

        tune.tune(tuner, clock, launches.META, all_precisions=all_precisions)
        assert specialisations(compiled) == specialisations(timed) and len(compiled) > 10
        is_half = {key[-1] in tune.HALF for key in tune.keys_of(tuner, all_precisions=all_precisions)}
        assert is_half == ({True, False} if all_precisions else {True})
        assert getattr(tuner.module, tuner.table) == before[name]


@pytest.fixture
def other_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton compiles for a GPU of compute capability 9.0 into this folder."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "made"))
    monkeypatch.setattr(driver, "_active", kit.OtherGPU("9.0"))
    yield tmp_path / "made"
    for launch in few_launches():
        launch.kernel.device_caches.clear()  # of a process that has a GPU


def few_launches() -> list[Launch]:
    calls = launches.op_calls(tuple(cases.energy_head_cases(2, 17, 9)))
    return [launch for call in calls for launch in launches_of(call)]


def test_kernels_are_compiled_in_other_processes_and_failures_told(other_gpu: Path) -> None:
    found = few_launches()
    assert precompile.compile_all(found, 2, load=False) == []
    kernels = [folder for folder in other_gpu.iterdir() if list(folder.glob("*.cubin"))]
    assert len(kernels) == len(found) == 3
    wrong = found[0]._replace(kwargs={**found[0].kwargs, "num_warps": 3})
    (failure,) = precompile.compile_all([wrong, *found], 2, load=False)
    assert failure.startswith(f"{wrong.kernel.__name__}: ") and "\n" not in failure


def test_launchers_are_built_too_where_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Compiled:
        @property
        def run(self) -> None:
            built.append("launcher")

    class Kernel:
        def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Compiled:
            assert warmup, "it is not to be launched"
            return Compiled()

    monkeypatch.setattr(precompile, "_inherited", [Launch(Kernel(), (), {})])  # type: ignore[arg-type]
    precompile._compile(0, load=False)
    assert built == []
    precompile._compile(0, load=True)
    assert built == ["launcher"]


def fail_in_two_lines(index: int, load: bool) -> None:
    raise ValueError("first\nsecond")


def test_failures_take_a_line_each(other_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_compile", fail_in_two_lines)
    (failure,) = precompile.compile_all(few_launches()[:1], 1, load=False)
    assert failure.endswith(": ValueError: first")


def test_processes_that_die_are_told(other_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_compile", end_the_process)
    assert all("BrokenProcessPool" in failure for failure in precompile.compile_all(few_launches(), 2, load=False))


def end_the_process(index: int, load: bool) -> None:
    os._exit(1)


def test_pairs_of_all_presets_that_stages_measure_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    presets: set[str] = set()
    monkeypatch.setattr(precompile, "pair_call", lambda preset, *_: presets.add(preset) or (lambda: None))
    precompile.recorded(["pair", "other presets"])
    assert presets == {case.partition(":")[0] for cases in stages.CASES for case in cases}


def test_a_part_that_cannot_be_recorded_withholds_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[Any]:
        yield from launches.op_calls(tuple(cases.energy_head_cases(2, 17, 9)))
        raise ValueError("first\nsecond")

    monkeypatch.setitem(precompile.CALLS, "smoke", fails)
    monkeypatch.setitem(precompile.CALLS, "ops", lambda: launches.op_calls(tuple(cases.energy_head_cases(2, 64, 4))))
    found, failures = precompile.recorded(["smoke", "ops"])
    assert failures == ["smoke: ValueError: first"]
    assert len(found) > len(precompile.recorded(["ops"])[0]) >= 3


def test_forks_are_refused_once_cuda_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is initialised in this process"):
        precompile.compile_all([], 1)


@pytest.fixture
def made(other_gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of a few kernels, made of a tree with a compiled part; the tree to install into has none."""
    source, target = tmp_path / "source", tmp_path / "target"
    for root in (source, target):
        for file, text in (("setup.py", "setup()"), ("csrc/module.cpp", "int x;"), ("vaebm_fast/__init__.py", "")):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
    compiled = source / "vaebm_fast" / "_C.so"
    compiled.write_bytes(b"compiled")
    monkeypatch.setattr(kit, "REPOSITORY", source)
    monkeypatch.setattr(kit, "_compiled_part", lambda: compiled)
    monkeypatch.setattr(precompile, "recorded", lambda parts: (few_launches(), []))
    said = kit.make(tmp_path / "kit.tar", "9.0")
    assert "_C.so and 3 Triton kernels" in said
    monkeypatch.setattr(kit, "REPOSITORY", target)
    return tmp_path / "kit.tar"


def unpacked(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened if member.isfile()}  # type: ignore[union-attr] # noqa: E501


def repacked(files: dict[str, bytes], tar: Path, **facts: str) -> None:
    """The kit with other facts in its manifest."""
    manifest = {**json.loads(files["manifest.json"]), **facts}
    with tarfile.open(tar, "w:gz") as opened:
        for name, content in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))


def test_a_kit_holds_what_a_launch_reads(made: Path) -> None:
    files = unpacked(made)
    kernels = {name for name in files if name.startswith("triton_cache/")}
    assert files["compiled/_C.so"] == b"compiled" and {Path(name).suffix for name in kernels} == {".json", ".cubin"}
    assert json.loads(files["manifest.json"])["torch"] == torch.__version__


def test_an_installed_kit_is_what_triton_looks_for(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "elsewhere" / "cache"
    assert "_C.so comes from" in (said := kit.install(made, cache))
    assert said.endswith(
        f"of Triton {triton.__version__} for compute capability 9.0, 3 of which were not in the cache."
    )
    assert (tmp_path / "target" / "vaebm_fast" / "_C.so").read_bytes() == b"compiled"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    hits: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: hits.append(told["cache_hit"]))
    for launch in few_launches():
        launch.kernel.device_caches.clear()
        launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
    assert hits == [True] * 3 and {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_kit_leaves_the_kernels_that_are_there(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kit.install(made, cache)
    first = next(iter(sorted(cache.iterdir())))
    (first / "mine").touch()
    _, second, third = sorted(cache.iterdir())
    shutil.rmtree(second)
    second.mkdir()  # as a look-up leaves it
    next(third.glob("*.cubin")).unlink()
    with (tmp_path / "target" / "vaebm_fast" / "_C.so").open("rb") as in_use:
        assert "2 of which were not in the cache" in kit.install(made, cache)
        assert os.fstat(in_use.fileno()).st_nlink == 0, "a library that a process has loaded is not written over"
        assert "0 of which were not in the cache" in kit.install(made, cache)
    next(third.glob("__grp__*")).write_text("{")
    assert "1 of which were not in the cache" in kit.install(made, cache)
    assert (first / "mine").exists() and list(second.glob("*.cubin")) and list(third.glob("*.cubin"))


@pytest.mark.parametrize("fact", ["python", "torch", "machine", "sources"])
def test_a_compiled_part_that_does_not_fit_is_not_installed_but_the_kernels_are(
    fact: str, made: Path, tmp_path: Path
) -> None:
    repacked(unpacked(made), made, **{fact: "other"})
    said = "from other sources: setup.py or csrc differs" if fact == "sources" else f"for {fact} other, not "
    with pytest.raises(ValueError, match=f"kit.tar was compiled {said}"):
        kit.install(made, tmp_path / "cache")
    assert not (tmp_path / "target" / "vaebm_fast" / "_C.so").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("file", ["setup.py", "csrc/module.cpp", "csrc/cuda/kernel.cu", "csrc/math.h"])
def test_a_changed_source_is_another_one(file: str, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "target" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("int y;")
    with pytest.raises(ValueError, match="other sources"):
        kit.install(made, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["missing", "no tar", "cut", "outside", "other bytes", "no list"])
def test_without_a_whole_kit_the_compiled_part_is_built(
    damage: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "missing":
        made.unlink()
    elif damage == "no tar":
        made.write_bytes(b"no tar")
    elif damage == "cut":
        made.write_bytes(made.read_bytes()[:-2000])
    elif damage == "other bytes":
        files = unpacked(made)
        cubin = next(name for name in files if name.endswith(".cubin"))
        repacked({**files, cubin: files[cubin][:-1] + b"?"}, made)
    elif damage == "no list":
        repacked({**unpacked(made), "manifest.json": b"{}"}, made)
    else:
        repacked({**unpacked(made), "../../outside": b"x"}, made)
    builds: list[int] = []
    monkeypatch.setattr(kit, "build", lambda: builds.append(1) or 0)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert kit.main(["install", "--kit", str(made)]) == 0
    said = capsys.readouterr().out
    assert builds == [1] and said.startswith("Building: ") and str(made) in said
    assert not (tmp_path / "target" / "vaebm_fast" / "_C.so").exists() and not (tmp_path / "outside").exists()
    assert not list((tmp_path / "cache").glob("*"))


def test_a_compiled_part_that_does_not_load_is_built_anew(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[int] = []
    monkeypatch.setattr(kit, "build", lambda: builds.append(1) or 0)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert kit.main(["install", "--kit", str(made)]) == 0 and builds == [1]  # "compiled" is no library
    monkeypatch.setattr(kit, "CHECK", "pass")
    assert kit.main(["install", "--kit", str(made)]) == 0 and builds == [1]


def test_a_build_replaces_the_library_that_is_there_and_is_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools would keep one that is newer than its sources, such as one of a kit that does not load."""
    library = tmp_path / "target" / "vaebm_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"of a kit")
    text = f"import os, pathlib\nassert os.environ['VAEBM_CUDA'] == '1'\npathlib.Path({str(library)!r}).touch(exist_ok=False)\n"  # noqa: E501
    (tmp_path / "target" / "setup.py").write_text(text)
    monkeypatch.setattr(kit, "CHECK", "pass")
    assert kit.build() == 0 and library.read_bytes() == b""
    monkeypatch.setattr(kit, "CHECK", "raise SystemExit(4)")
    assert kit.build() == 4
    (tmp_path / "target" / "setup.py").write_text("raise SystemExit(5)")
    library.write_bytes(b"of pip")
    assert kit.build() == 5 and library.read_bytes() == b"of pip"
    assert [path.name for path in library.parent.iterdir() if path.name.startswith("_C")] == [library.name]


def test_a_kit_needs_a_compiled_part_with_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.extension, "has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="no compiled part with CUDA kernels for this Python; `make gpu-kit` builds"):
        kit.make(tmp_path / "kit.tar", "9.0")


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (kit.main, ["make", "--capability", "9"], "--capability is 9; it must be like 8.0 or 9.0."),
        (kit.main, ["make", "--capability", "sm_90"], "--capability is sm_90; it must"),
        (precompile.main, ["--processes", "0"], "0 is not a whole number of at least 1"),
        (training.main, ["--rounds", "-1"], "argument --rounds: -1 is not a whole number of at least 1"),
        (precompile.main, [], "kernels are compiled for the GPU at hand, and there is none; `make gpu-kit` compiles"),
    ],
)
def test_what_cannot_be_is_said(
    main: Any, words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        main(words)
    assert sentence in capsys.readouterr().err


def test_recording_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes could not use it otherwise; asking whether there is a GPU would do it."""

    def asked(*_: Any) -> int:
        raise AssertionError("CUDA was asked for its devices")

    for name in ("_cuda_getDeviceCount", "_cuda_init"):
        monkeypatch.setattr(torch._C, name, asked, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", asked)
    launches, failures = precompile.recorded(list(precompile.CALLS))
    assert launches and not failures


def test_what_was_not_recorded_or_did_not_compile_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precompile.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 0))
    monkeypatch.setattr(precompile.torch, "set_num_threads", lambda number: None)
    for unrecorded, failures in ((["smoke: a"], []), ([], ["kernel: b"]), (["smoke: a"], ["kernel: b"]), ([], [])):
        monkeypatch.setattr(precompile, "recorded", lambda parts, found=unrecorded: (few_launches(), [*found]))
        monkeypatch.setattr(precompile, "compile_all", lambda *_, found=failures, **__: [*found])
        assert precompile.main([]) == bool(unrecorded + failures)
        *lines, last = capsys.readouterr().out.strip().splitlines()
        assert [line for line in lines if line] == unrecorded + failures
        assert last.startswith(f"3 kernels, {len(unrecorded + failures)} failed; ")
        assert kit._compile_kernels("9.0") == unrecorded + failures


def test_a_kernel_that_does_not_compile_makes_no_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "_compiled_part", lambda: tmp_path / "_C.so")
    monkeypatch.setattr(kit, "_compile_kernels", lambda capability: ["kernel: error"])
    with pytest.raises(SystemExit, match="kernel: error"):
        kit.make(tmp_path / "kit.tar", "9.0")
    assert not (tmp_path / "kit.tar").exists()
