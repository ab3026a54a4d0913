"""The sampling job in one process: formats, what is recorded, what is verified and completed, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_jobs import images_in, options_for, save_networks, tiny_model

from vaebm_fast.checkpoint import content_sha256, save_energy
from vaebm_fast.langevin import Chains, LangevinSampler, to_uint8
from vaebm_fast.sampling import SampleOptions, SamplingError, blocks, folder, journal, outputs, run_job
from vaebm_fast.sampling.blocks import BlockSampler, automatic_batch_size
from vaebm_fast.sampling.journal import Journal, Record, Watcher
from vaebm_fast.sampling.options import Seeds
from vaebm_fast.sampling.outputs import Output, Part
from vaebm_fast.sampling.telemetry import GpuMeter, gpu_meter

Networks = tuple[Path, Path]
FORMATS = ("png", "zip", "tar", "npz", "npy")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    return save_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def options(networks: Networks, tmp_path: Path) -> SampleOptions:
    return options_for(networks, tmp_path / "out")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were computed."""
    seen: list[int] = []
    run = BlockSampler.run

    def counted(self: BlockSampler, index: int, seeds: Sequence[int]) -> blocks.Block:
        seen.append(index)
        return run(self, index, seeds)

    monkeypatch.setattr(BlockSampler, "run", counted)
    return seen


def expected_images(options: SampleOptions, batch_size: int = 4) -> np.ndarray:
    """What a bare sampler makes of the seeds 0-9 in such batches."""
    sampler = LangevinSampler(tiny_model(), steps=options.steps or 0, step_size=options.step_size or 1.0)
    batches = [range(at, min(at + batch_size, 10)) for at in range(0, 10, batch_size)]
    return torch.cat([to_uint8(sampler.run(batch).images) for batch in batches]).numpy()


def pictures(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in images_in(out).items() if name.endswith(".png")}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# Seeds and options.
@pytest.mark.parametrize(
    ("text", "spelled", "seeds"),
    [
        ("5", "5", [5]),
        ("0-3", "0-3", [0, 1, 2, 3]),
        ("7, 0-1,3-4", "0-1,3-4,7", [0, 1, 3, 4, 7]),
        ("2-3,0-1", "0-3", [0, 1, 2, 3]),
        (str(2**64 - 1), str(2**64 - 1), [2**64 - 1]),
    ],
)
def test_seeds_are_read_in_ascending_order_with_one_spelling(text: str, spelled: str, seeds: list[int]) -> None:
    parsed = Seeds.parse(text)
    assert str(parsed) == spelled and len(parsed) == len(seeds) and parsed.largest == seeds[-1]
    assert parsed.between(0, len(seeds)) == seeds
    for size in (1, 2, 3, 10):
        dealt = [parsed.block(block, size) for block in range(parsed.total_blocks(size))]
        assert dealt == [seeds[at : at + size] for at in range(0, len(seeds), size)]


def test_seeds_without_some_are_the_others() -> None:
    seeds = Seeds.parse("0-5,10-12")
    assert seeds.without([]) == "0-5,10-12" and seeds.without([0, 3, 12]) == "1-2,4-5,10-11"
    assert seeds.without(seeds.between(0, 9)) == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Seeds '' are not of the form"),
        ("0-", "Seeds '0-' are not of the form"),
        ("0-9,a", "Seeds 'a' are not of the form"),
        ("-3", "Seeds '-3' are not of the form"),
        ("9-0", "'9-0' do not run upwards"),
        (f"0-{2**64}", "do not run upwards within"),
        ("0-5,5", "Seed 5 is given twice"),
        ("3-9,0-4", "Seed 3 is given twice"),
        (f"0-{2**62}", "more images than any disk holds"),
    ],
)
def test_seeds_that_are_none_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Seeds.parse(text)


def test_the_chain_is_the_presets_where_it_is_not_given(options: SampleOptions) -> None:
    bare = replace(options, steps=None, step_size=None)
    chain = replace(bare, preset="digits", steps=0, temperature=0.7).chain()
    assert (chain.steps, chain.step_size, chain.potential, chain.temperature) == (0, 0.15, "paper", 0.7)
    with pytest.raises(ValueError, match="name a preset, or give both the steps and the step size"):
        replace(bare, steps=3).chain()
    with pytest.raises(ValueError, match="Preset 'mnist' is not known; there are cifar10"):
        replace(bare, preset="mnist").chain()
    for name in ("batch_size", "processes"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            replace(options, **{name: 0})


# Formats.
def test_png_files_hold_the_bare_samplers_images_named_by_seed(options: SampleOptions) -> None:
    assert run_job(options) == 0
    found = pictures(options.out)
    assert list(sorted(found)) == [f"000000/{seed:06d}.png" for seed in range(10)]
    images = np.stack([pixels(found[name]) for name in sorted(found)])
    assert np.array_equal(images, expected_images(options))
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10, "each image is another"


@pytest.mark.parametrize("format", FORMATS[1:])
def test_every_format_holds_the_same_images(format: Any, options: SampleOptions) -> None:
    assert run_job(options) == 0 and run_job(replace(options, out=options.out / "x", format=format)) == 0
    out, png = options.out / "x", pictures(options.out)
    images = np.stack([pixels(png[name]) for name in sorted(png)])
    if format == "zip":
        with zipfile.ZipFile(out / "samples.zip") as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == png
            assert archive.namelist() == sorted(png)
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    elif format == "tar":
        with tarfile.open(out / "samples-00000.tar") as archive:
            found = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        assert list(found) == [f"{seed:06d}.{kind}" for seed in range(10) for kind in ("json", "png")]
        assert {f"000000/{name}": data for name, data in found.items() if name.endswith("png")} == png
        assert [json.loads(data)["seed"] for name, data in found.items() if name.endswith("json")] == list(range(10))
    else:
        loaded = np.load(out / f"samples.{format}")
        assert np.array_equal(loaded["arr_0"] if format == "npz" else loaded, images)
        assert format == "npy" or loaded["seeds"].tolist() == list(range(10))
    assert not (out / ".job" / "parts").exists()


def test_a_thousand_files_share_a_folder_and_names_sort_as_seeds_do() -> None:
    seeds = [0, 999, 1000, 1001, 123_456_789]
    names = list(Output("png", seeds[-1], (1, 2, 2)).encode(0, seeds, np.zeros((5, 2, 2, 1), np.uint8)))
    assert names[1:3] == ["000000000/000000999.png", "000001000/000001000.png"] and names == sorted(names)
    assert names[-1] == "123456000/123456789.png"
    shards = Output("tar", 2499, (1, 2, 2)).products(2500)
    assert [(shard.name, shard.first, shard.stop) for shard in shards] == [
        ("samples-00000.tar", 0, 1000),
        ("samples-00001.tar", 1000, 2000),
        ("samples-00002.tar", 2000, 2500),
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_lossless_in_grey_and_in_colour(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 7, channels), dtype=np.uint8)
    [data] = Output("png", 0, (channels, 5, 7)).encode(0, [0], image).values()
    assert np.array_equal(pixels(data).reshape(5, 7, channels), image[0])


@pytest.mark.parametrize("format", FORMATS[1:])
def test_bytes_do_not_depend_on_the_time(format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, images = Output(format, 2, (3, 2, 2)), np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3)
    made = []
    for now in (1e9, 1.5e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        monkeypatch.setattr(time, "localtime", lambda *_, now=now: time.gmtime(now))
        [data] = output.encode(0, [0, 1, 2], images).values()
        (tmp_path / "part").write_bytes(data)
        file = io.BytesIO()
        output.assemble([Part(tmp_path / "part", [0, 1, 2])], [0, 1, 2], file)
        made.append(file.getvalue())
    assert made[0] == made[1]


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
        ({"temperature": 0.9}, r"temperature was 1\.0 and is 0\.9"),
        ({"dtype": "float64"}, r"dtype was float32 and is float64"),
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
    with pytest.raises(SamplingError, match=r"\(energy was [0-9a-f]{64} and is [0-9a-f]{64}\); use the same"):
        run_job(replace(options, energy=tmp_path / "other"))


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


# Batches and memory.
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_another_batch_size_changes_no_pixel_by_more_than_one_grey_level(
    batch_size: int, options: SampleOptions
) -> None:
    assert run_job(replace(options, batch_size=batch_size)) == 0
    found = pictures(options.out)
    images = np.stack([pixels(found[name]) for name in sorted(found)]).astype(int)
    assert int(np.abs(images - expected_images(options)).max()) <= 1


def test_an_automatic_batch_size_is_kept_when_the_job_is_completed(options: SampleOptions) -> None:
    automatic = replace(options, batch_size=None, seeds="0-4")
    assert run_job(replace(automatic, batch_size=3)) == 0
    (options.out / "000000" / "000000.png").unlink()
    assert run_job(automatic) == 0
    assert json.loads((options.out / "manifest.json").read_text())["batch_size"] == 3


@pytest.mark.parametrize(
    ("side", "total", "expected"), [(256, 50_000, 1), (64, 50_000, 4), (8, 50_000, 256), (8, 1000, 16), (8, 3000, 32)]
)
def test_an_automatic_batch_is_a_power_of_two_by_pixels_and_images(side: int, total: int, expected: int) -> None:
    sampler: Any = SimpleNamespace(layout=SimpleNamespace(image_shape=(3, side, side)), device=torch.device("cpu"))
    assert automatic_batch_size(sampler, total) == expected


def test_on_a_gpu_the_free_memory_bounds_an_automatic_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step takes 100 bytes, and 10 more for each image."""
    taken = {"peak": 0, "free": 0}
    sampler: Any = SimpleNamespace(
        layout=SimpleNamespace(image_shape=(3, 16, 16)), device=torch.device("cuda"),
        model=None, step_sizes=(0.1, 0.1), potential="paper",
    )  # fmt: skip

    class Probe:
        def __init__(self, model: None, *, steps: int, step_size: Sequence[float], **_: Any) -> None:
            assert steps == len(step_size) == 1

        def run(self, seeds: Sequence[int], nonfinite: str) -> None:
            taken["peak"] = 1000 + 100 + 10 * len(seeds)

    monkeypatch.setattr(blocks, "LangevinSampler", Probe)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: taken["peak"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (taken["free"], 10**9))
    for free, expected in ((0, 1), (1645, 64), (1644, 32), (10**8, 512)):
        taken["free"] = free
        assert automatic_batch_size(sampler, 50_000) == expected


class ShortOfMemory:
    """A sampler whose memory takes `most` images at a time; image i has the grey level of its seed."""

    device = torch.device("cpu")

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, []

    def run(self, seeds: Sequence[int], nonfinite: str) -> Chains:
        self.tried.append(len(seeds))
        if len(seeds) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        levels = torch.tensor(seeds).reshape(-1, 1, 1, 1) / 255
        return Chains(torch.empty(0), torch.empty(0), levels.expand(-1, 1, 2, 2))


def test_out_of_memory_a_block_is_computed_in_halves_and_those_after_it_too() -> None:
    sampler: Any = ShortOfMemory(most=3)
    computing = BlockSampler(sampler, 10)
    first, second = computing.run(0, range(10)), computing.run(1, range(10, 14))
    assert sampler.tried == [10, 5, 3, 3, 3, 1, 3, 1]
    assert first.on_host()[:, 0, 0, 0].tolist() == list(range(10)) and first.seeds == list(range(10))
    assert second.seeds == list(range(10, 14)) and (first.computed_at_once, second.computed_at_once) == (3, 3)
    none: Any = ShortOfMemory(most=0)
    with pytest.raises(SamplingError, match="does not take even one image"):
        BlockSampler(none, 4).run(0, range(4))


def test_a_job_that_ran_out_of_memory_has_all_images_and_says_which_blocks(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LangevinSampler.run

    def short(self: LangevinSampler, seeds: Sequence[int], **others: Any) -> Chains:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, seeds, **others)

    monkeypatch.setattr(LangevinSampler, "run", short)
    assert run_job(options) == 0
    assert len(pictures(options.out)) == 10
    assert json.loads((options.out / "summary.json").read_text())["blocks_computed_in_pieces"] == [0, 1]


# Chains that are not finite.
@pytest.fixture
def troubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds 2 and 9 fail, seed 5 comes out well the second time."""
    run = LangevinSampler.run

    def troubled(self: LangevinSampler, seeds: Sequence[int], **others: Any) -> Chains:
        chains = run(self, seeds, **others)
        failed = [position for position, seed in enumerate(seeds) if seed in (2, 9)]
        chains.images[failed] = torch.nan
        redone = [position for position, seed in enumerate(seeds) if seed == 5]
        return replace(chains, redone=redone, failed=failed)

    monkeypatch.setattr(LangevinSampler, "run", troubled)


@pytest.mark.usefixtures("troubled")
@pytest.mark.parametrize("format", FORMATS)
def test_failed_chains_have_no_image_and_are_named_while_all_others_are_written(
    format: Any, options: SampleOptions, computed: list[int]
) -> None:
    options, kept = replace(options, format=format), [seed for seed in range(10) if seed not in (2, 9)]
    sentence = r"^2 of 10 chains were not finite, nor when done again, and have no image .*\(seeds 2, 9\)"
    for _ in range(2):  # the second run computes nothing, and says it again
        with pytest.raises(SamplingError, match=sentence):
            run_job(options)
    assert computed == [0, 1, 2]
    summary = json.loads((options.out / "summary.json").read_text())
    assert summary["failed_seeds"] == [2, 9] and summary["redone_seeds"] == [5] and summary["images"] == 8
    assert summary["finished_seeds"] == "0-1,3-8"
    expected = expected_images(options)[kept]
    if format in ("npy", "npz"):
        loaded = np.load(options.out / f"samples.{format}")
        assert np.array_equal(loaded["arr_0"] if format == "npz" else loaded, expected)
        assert format == "npy" or loaded["seeds"].tolist() == kept
    elif format == "png":
        found = pictures(options.out)
        assert np.array_equal(np.stack([pixels(found[name]) for name in sorted(found)]), expected)
    elif format == "zip":
        with zipfile.ZipFile(options.out / "samples.zip") as archive:
            assert archive.namelist() == [f"000000/{seed:06d}.png" for seed in kept]
    else:
        with tarfile.open(options.out / "samples-00000.tar") as archive:
            assert [name for name in archive.getnames() if name.endswith("png")] == [f"{s:06d}.png" for s in kept]


@pytest.mark.parametrize("format", ["png", "npz"])
def test_where_every_chain_leaves_the_numbers_there_is_no_image_and_no_black_square(
    format: Any, options: SampleOptions
) -> None:
    with pytest.raises(SamplingError, match=r"^10 of 10 chains .*\(seeds 0, 1, 2, 3, 4, 5, 6, 7 and 2 more\)"):
        run_job(replace(options, step_size=1e35, format=format))
    assert pictures(options.out) == {}
    assert format == "png" or np.load(options.out / "samples.npz")["arr_0"].shape == (0, 4, 4, 3)
    assert json.loads((options.out / "summary.json").read_text())["finished_seeds"] == ""


# The disk, the meter, the command.
def test_an_array_that_does_not_fit_on_the_disk_is_refused_and_pictures_are_warned_of(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * 10 * 48  # bytes of ten images twice: once in parts, once put together
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(SamplingError, match=r"These images need .* GiB, and .* has .* GiB free; free some"):
        run_job(replace(options, format="npy"))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert run_job(replace(options, format="npy", out=options.out / "fits")) == 0
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 48 // 2 - 1))
    with pytest.warns(UserWarning, match="These images need about .* once the disk is full, free some"):
        assert run_job(replace(options, out=options.out / "png")) == 0


class FakeNVML:
    """A GPU that is busy at 80, then 90 percent, and takes 100 J between two looks at its counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, mute: bool = False) -> None:
        self._mute, self._busy, self._mj = mute, iter([80, 90] + [90] * 1000), 5000

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        if self._mute:
            raise self.NVMLError
        return SimpleNamespace(gpu=next(self._busy))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self._mute:
            raise self.NVMLError
        self._mj += 100_000
        return self._mj


def test_a_meter_reports_utilisation_memory_and_joules_per_image() -> None:
    with GpuMeter(FakeNVML(), "gpu", period_s=0.01) as meter:
        time.sleep(0.1)
    figures = meter.figures(images=20)
    assert 80 < (figures["utilisation_percent"] or 0) <= 90
    assert figures["memory_gib"] == 3 and figures["joules"] == 100 and figures["joules_per_image"] == 5
    with GpuMeter(FakeNVML(mute=True), "gpu") as meter:
        pass
    assert set(meter.figures(images=0).values()) == {None}


def test_the_meter_of_a_device_is_found_by_its_uuid_and_missing_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml: Any = FakeNVML()
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = asked.append
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_meter(torch.device("cuda", 1)) is not None and asked == ["GPU-12-34"]
    assert gpu_meter(torch.device("cpu")) is None

    def no_driver() -> None:
        raise nvml.NVMLError

    nvml.nvmlInit = no_driver
    assert gpu_meter(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert gpu_meter(torch.device("cuda")) is None
