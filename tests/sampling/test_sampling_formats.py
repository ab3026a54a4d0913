"""What a sampling job is told and what it writes: seeds, the presets' chains, and files of every format."""

from __future__ import annotations

import io
import json
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.sampling_jobs import FORMATS, computed, expected_images, networks, options, pictures, pixels
from vaebm_fast.data import open_source
from vaebm_fast.sampling import SampleOptions, SamplingError, run_job
from vaebm_fast.sampling.outputs import Output, Part
from vaebm_fast.sampling.seeds import Seeds

__all__ = ["computed", "networks", "options"]  # fixtures


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
        ("9-0", "'9-0' are not an ascending range"),
        (f"0-{2**64}", "are not an ascending range within"),
        ("0-5,5", "Seed 5 is given twice"),
        ("3-9,0-4", "Seed 3 is given twice"),
        (f"0-{2**62}", "are 2\\^40 images or more"),
    ],
)
def test_seeds_that_are_none_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Seeds.parse(text)


def test_the_chain_is_the_presets_where_it_is_not_given(options: SampleOptions) -> None:
    bare = replace(options, steps=None, step_size=None)
    chain = replace(bare, preset="digits", steps=0, temperature=0.7).resolve().chain
    assert (chain.steps, chain.step_size, chain.potential, chain.temperature) == (0, 0.15, "paper", 0.7)
    with pytest.raises(ValueError, match="give --preset, or both --steps and --step-size"):
        replace(bare, steps=3).resolve()
    with pytest.raises(ValueError, match="Preset 'mnist' is not known; it must be one of cifar10"):
        replace(bare, preset="mnist").resolve()
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


@pytest.mark.parametrize("format", ["png", "zip"])
def test_flat_names_are_beside_each_other_with_the_same_pixels(format: Any, options: SampleOptions) -> None:
    assert run_job(replace(options, out=options.out / "grouped")) == 0
    out = options.out / "flat"
    flat = replace(options, out=out, format=format, flat=True)
    assert run_job(flat) == 0
    if format == "zip":
        with zipfile.ZipFile(out / "samples.zip") as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
    else:
        found = {path.name: path.read_bytes() for path in out.glob("*.png")}
        assert sorted(path.name for path in out.iterdir() if path.suffix != ".png") == [
            ".job", "manifest.json", "summary.json",
        ]  # fmt: skip
    assert found == {name.removeprefix("000000/"): data for name, data in pictures(options.out / "grouped").items()}
    with pytest.raises(SamplingError, match="flat was True and is False"):
        run_job(replace(flat, flat=False))
    if format == "png":
        (out / "000004.png").unlink()
        assert run_job(flat) == 0 and (out / "000004.png").read_bytes() == found["000004.png"]


def test_a_folder_of_before_is_not_flat(options: SampleOptions) -> None:
    assert run_job(options) == 0
    manifest = options.out / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "flat"}))
    assert run_job(options) == 0
    with pytest.raises(SamplingError, match="flat was False and is True"):
        run_job(replace(options, flat=True))


@pytest.mark.parametrize("format", ["tar", "npz", "npy"])
def test_flat_is_refused_where_there_are_no_folders(format: Any, options: SampleOptions) -> None:
    with pytest.raises(ValueError, match=f"flat is for the formats png and zip; {format} has no folders"):
        replace(options, format=format, flat=True)


@pytest.mark.parametrize(("format", "flat"), [*((format, False) for format in FORMATS), ("png", True)])
def test_samples_of_every_format_open_as_training_images(
    format: Any, flat: bool, options: SampleOptions, recwarn: pytest.WarningsRecorder
) -> None:
    job = replace(options, format=format, flat=flat)
    run_job(job)
    paths = [job.out, *(path for path in job.out.iterdir() if path.name.startswith("samples"))]
    read = [open_source(path, image_size=4, image_channels=3).read(np.arange(10)) for path in paths]
    assert len(read) == 1 + (format != "png") and all((images == expected_images(job)).all() for images in read)
