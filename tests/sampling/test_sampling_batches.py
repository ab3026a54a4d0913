"""How a sampling job computes its blocks: batches by memory, chains that are not finite; the disk and the meter."""

from __future__ import annotations

import json
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.sampling_jobs import FORMATS, computed, expected_images, networks, options, pictures, pixels
from vaebm_fast.chain.langevin import Chains, LangevinSampler
from vaebm_fast.sampling import SampleOptions, SamplingError, blocks, folder, job, run_job
from vaebm_fast.sampling.blocks import BlockSampler, automatic_batch_size
from vaebm_fast.sampling.telemetry import GpuMeter, gpu_meter

__all__ = ["computed", "networks", "options"]  # fixtures


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
    sampler: Any = SimpleNamespace(
        noise_layout=SimpleNamespace(image_shape=(3, side, side)), device=torch.device("cpu")
    )
    assert automatic_batch_size(sampler, total) == expected


def test_on_a_gpu_the_free_memory_bounds_an_automatic_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step takes 100 bytes, and 10 more for each image."""
    taken = {"peak": 0, "free": 0}
    sampler: Any = SimpleNamespace(
        noise_layout=SimpleNamespace(image_shape=(3, 16, 16)), device=torch.device("cuda"),
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
    with pytest.raises(SamplingError, match="One image does not fit in memory"):
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
    sentence = r"^2 of 10 chains were not finite, even when rerun, and have no image .*\(seeds 2, 9\)"
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
    with pytest.raises(SamplingError, match=r"These images need .* GiB, but .* has .* GiB free; free some space"):
        run_job(replace(options, format="npy"))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert run_job(replace(options, format="npy", out=options.out / "fits")) == 0
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 48 // 2 - 1))
    with pytest.warns(UserWarning, match="These images need about .* if the disk fills up, free some"):
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


def test_a_job_has_cudnn_choose_without_a_clock_what_sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    with job._reproducible():
        assert cudnn.deterministic and not cudnn.benchmark
    assert not cudnn.deterministic and cudnn.benchmark
