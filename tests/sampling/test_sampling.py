"""The sampling job in one process: what is recorded, what is verified and completed, and what is refused."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.sampling_jobs import FORMATS, computed, images_in, networks, options, tiny_model
from vaebm_fast.checkpoint import content_sha256, save_energy
from vaebm_fast.sampling import SampleOptions, SamplingError, folder, journal, outputs, run_job
from vaebm_fast.sampling.journal import Journal, Record, Watcher

__all__ = ["computed", "networks", "options"]  # fixtures


def test_progress_is_what_all_processes_have_added_to_their_journals(tmp_path: Path) -> None:
    job = folder.Folder(tmp_path)
    job.prepare()
    Journal(job, 0).add(Record(0, images=4, computed_at_once=4, files={}))
    journal.merge(job, journal.read(job))  # of an earlier run
    watcher = Watcher(job)
    assert watcher.new_images() == 0
    Journal(job, 0).add(Record(1, images=4, computed_at_once=4, files={}))
    Journal(job, 7).add(Record(2, images=2, computed_at_once=4, files={}))
    with (tmp_path / ".job" / "journal.7.jsonl").open("ab") as file:
        file.write(b'{"block": 3, "images": 4,')
        file.flush()
        assert watcher.new_images() == 6 and watcher.new_images() == 0
        file.write(b' "computed_at_once": 4, "files": {}}\n')
    assert watcher.new_images() == 4
    job.release()


# What a job records, and what it makes of a folder that holds something.
def test_the_manifest_holds_hashes_and_settings_and_the_summary_what_was_done(options: SampleOptions) -> None:
    assert run_job(options) == 0
    manifest, summary = (json.loads((options.out / f"{name}.json").read_text()) for name in ("manifest", "summary"))
    model = tiny_model()
    assert (
        manifest.items()
        >= {
            "nvae": content_sha256(model.vae),
            "energy": content_sha256(model.energy),
            "seeds": "0-9",
            "steps": 3,
            "step_size": 0.05,
            "potential": "official",
            "temperature": 1.0,
            "dtype": "float32",
            "batch_size": 4,
            "format": "png",
            "threads": torch.get_num_threads(),
        }.items()
    )
    assert summary["images"] == 10 and summary["finished_seeds"] == "0-9" and summary["failed_seeds"] == []
    run = summary["this_run"]
    assert run["images"] == 10 and run["images_per_second"] == pytest.approx(10 / run["seconds"])


def test_a_complete_job_is_verified_and_left_alone(
    options: SampleOptions, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(options) == 0
    before = {path: path.stat().st_mtime_ns for path in options.out.rglob("*.png")}
    summary = (options.out / "summary.json").read_text()
    assert run_job(options) == 0
    assert computed == [0, 1, 2] and "All 10 images are in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in options.out.rglob("*.png")} == before
    assert (options.out / "summary.json").read_text() == summary


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["removed", "cut", "bit"])
def test_a_block_with_a_damaged_file_is_made_again(how: str, options: SampleOptions, computed: list[int]) -> None:
    assert run_job(options) == 0
    whole = images_in(options.out)
    damage(options.out / "000000" / "000006.png", how)
    assert run_job(options) == 0
    assert computed == [0, 1, 2, 1] and images_in(options.out) == whole


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_damaged_product_is_made_again(format: Any, options: SampleOptions, computed: list[int]) -> None:
    options = replace(options, format=format)
    assert run_job(options) == 0
    whole = images_in(options.out)
    damage(next(options.out.glob("samples*")), "bit")
    assert run_job(options) == 0
    assert computed == [0, 1, 2] * 2 and images_in(options.out) == whole


def test_of_several_tars_only_the_blocks_of_a_damaged_one_are_made_again(
    options: SampleOptions, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PER_GROUP", 3)
    options = replace(options, format="tar", batch_size=2)
    assert run_job(options) == 0
    whole = images_in(options.out)
    for shard, seeds in enumerate(([0, 1, 2], [3, 4, 5], [6, 7, 8], [9])):
        with tarfile.open(options.out / f"samples-{shard:05d}.tar") as archive:
            assert [int(name[:6]) for name in archive.getnames()[::2]] == seeds
    damage(options.out / "samples-00001.tar", "cut")  # positions 3, 4, 5
    computed.clear()
    assert run_job(options) == 0
    assert computed == [1, 2] and images_in(options.out) == whole


def test_torn_and_garbled_journal_lines_and_stray_temporaries_are_nothing(
    options: SampleOptions, computed: list[int]
) -> None:
    assert run_job(options) == 0
    whole = images_in(options.out)
    journal = options.out / ".job" / "journal.0.jsonl"
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second.replace(b'"block"', b'"bl\xffck"') + third[:-30])
    (options.out / ".job" / "tmp" / "stray").write_bytes(b"half an image")
    assert run_job(options) == 0
    assert computed == [0, 1, 2, 1, 2] and images_in(options.out) == whole
    assert list((options.out / ".job" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seeds": "0-19"}, r"seeds was 0-9 and is 0-19"),
        ({"steps": 4}, r"steps was 3 and is 4"),
        ({"step_size": 0.1}, r"step_size was 0\.05 and is 0\.1"),
        ({"potential": "paper"}, r"potential was official and is paper"),
        ({"temperature": 1.1}, r"temperature was 1\.0 and is 1\.1"),
        ({"dtype": "bfloat16"}, r"dtype was float32 and is bfloat16"),
        ({"batch_size": 5}, r"batch_size was 4 and is 5"),
        ({"format": "zip"}, r"format was png and is zip"),
    ],
)
def test_another_configuration_is_refused_by_name(
    changed: dict[str, Any], sentence: str, options: SampleOptions
) -> None:
    assert run_job(options) == 0
    whole = images_in(options.out)
    with pytest.raises(SamplingError, match=f"^{options.out} holds images of another configuration.*{sentence}"):
        run_job(replace(options, **changed))
    assert images_in(options.out) == whole


def test_other_weights_are_refused(options: SampleOptions, tmp_path: Path) -> None:
    assert run_job(options) == 0
    save_energy(tiny_model(seed=4).energy, tmp_path / "other")
    with pytest.raises(SamplingError, match=r"\(energy was [0-9a-f]{64} and is [0-9a-f]{64}\); use the same settings"):
        run_job(replace(options, energy=tmp_path / "other"))


def test_a_folder_that_recorded_a_backend_by_its_former_name_goes_on(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_job(options) == 0
    path = options.out / "manifest.json"
    settings = json.loads(path.read_text())
    if settings["backend"] != "cpp":
        pytest.skip("the compiled part is not built")
    path.write_text(json.dumps({**settings, "backend": "cpu"}))
    assert run_job(options) == 0
    path.write_text(json.dumps({**settings, "backend": "reference"}))
    with pytest.raises(SamplingError, match="backend was reference and is cpp"):
        run_job(options)


def test_a_folder_of_other_files_is_refused_and_left_as_it_is(options: SampleOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.tex").touch()
    with pytest.raises(SamplingError, match=r"holds thesis\.tex, which no sampling job wrote; name another folder\."):
        run_job(options)
    assert [path.name for path in options.out.iterdir()] == ["thesis.tex"]


def test_a_damaged_manifest_is_named(options: SampleOptions) -> None:
    assert run_job(options) == 0
    for content in ("{", "[]"):
        (options.out / "manifest.json").write_text(content)
        with pytest.raises(SamplingError, match=r"manifest\.json is damaged"):
            run_job(options)


def test_a_preset_for_other_images_and_a_missing_gpu_are_refused(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"makes images of shape \(3, 4, 4\).* preset digits is for \(1, 8, 8\)"):
        run_job(replace(options, preset="digits"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
        run_job(replace(options, device="cuda"))
