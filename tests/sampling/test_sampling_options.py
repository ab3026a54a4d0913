"""The sampling job's options: schedules, start temperatures, the NVAE alone, and folders begun by older releases."""

from __future__ import annotations

import json
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.builders import TINY_NVAE
from tests.helpers.sampling_jobs import images_in, options_for, save_networks, tiny_model
from vaebm_fast.chain.langevin import Chains, LangevinSampler, to_uint8
from vaebm_fast.checkpoint import CheckpointError, content_sha256, load_energy, save_nvae
from vaebm_fast.config import Likelihood
from vaebm_fast.frozen import FrozenNVAE, StaleWeightsError
from vaebm_fast.models import NVAE
from vaebm_fast.runtime import command, ranks
from vaebm_fast.sampling import SampleOptions, SamplingError, blocks, folder, job, journal, plan, run_job
from vaebm_fast.sampling.blocks import BlockSampler, automatic_batch_size
from vaebm_fast.sampling.journal import Journal, Record
from vaebm_fast.sampling.seeds import MOST_SEEDS, Seeds

Networks = tuple[Path, Path]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    return save_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def options(networks: Networks, tmp_path: Path) -> SampleOptions:
    return options_for(networks, tmp_path / "out", format="npy")


@pytest.fixture
def alone(options: SampleOptions) -> SampleOptions:
    """The NVAE's own samples, and no energy network."""
    return replace(options, steps=0, step_size=None, energy=None)


def images(options: SampleOptions) -> np.ndarray:
    """What the job writes."""
    assert run_job(options) == 0
    found: np.ndarray = np.load(options.out / "samples.npy")
    return found


def manifest(options: SampleOptions) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((options.out / "manifest.json").read_text())
    return found


def of_bare_sampler(model: Any, **chain: Any) -> np.ndarray:
    """The seeds 0-9 in batches of 4."""
    sampler = LangevinSampler(model, **chain)
    batches = [range(at, min(at + 4, 10)) for at in range(0, 10, 4)]
    return torch.cat([to_uint8(sampler.run(batch).images) for batch in batches]).numpy()


# A schedule, and the temperature of the start.
def test_the_command_takes_a_schedule_and_a_start_temperature(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("vaebm_fast.cli")  # which needs tyro
    seen: list[SampleOptions] = []
    monkeypatch.setattr(cli.sample, "run_job", lambda options: seen.append(options) or 0)
    arguments = ["sample", "--nvae", str(networks[0]), "--seeds", "0-9", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--steps", "3", "--step-size", "3e-6", "2e-6", "1e-6"]) == 0
    assert cli.main([*arguments, "--step-size", "3e-6", "--steps", "3", "--start-temperature", "0.5"]) == 0
    assert cli.main([*arguments, "--steps", "0"]) == 0
    assert [options.step_size for options in seen] == [(3e-6, 2e-6, 1e-6), 3e-6, None]
    assert [options.start_temperature for options in seen] == [1.0, 0.5, 1.0]


def test_a_schedule_and_a_start_temperature_are_those_of_the_sampler_and_are_kept(options: SampleOptions) -> None:
    chain: dict[str, Any] = {"steps": 3, "step_size": (0.08, 0.05, 0.02), "start_temperature": 0.7}
    options = replace(options, **chain)
    made = images(options)
    assert np.array_equal(made, of_bare_sampler(tiny_model(), **chain))
    for other in ({"step_size": 0.05}, {"start_temperature": 1.0}):
        assert not np.array_equal(made, of_bare_sampler(tiny_model(), **{**chain, **other})), "each of them matters"
    assert manifest(options).items() >= {"step_size": [0.08, 0.05, 0.02], "start_temperature": 0.7}.items()
    (options.out / "samples.npy").unlink()
    assert np.array_equal(images(options), made)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"step_size": (0.08, 0.05, 0.03)}, r"step_size was \[0\.08, 0\.05, 0\.02\] and is \[0\.08, 0\.05, 0\.03\]"),
        ({"step_size": 0.05}, r"step_size was \[0\.08, 0\.05, 0\.02\] and is 0\.05"),
        ({"start_temperature": 0.9}, r"start_temperature was 1\.0 and is 0\.9"),
    ],
)
def test_another_schedule_or_start_is_refused(changed: dict[str, Any], sentence: str, options: SampleOptions) -> None:
    options = replace(options, step_size=(0.08, 0.05, 0.02))
    assert run_job(options) == 0
    with pytest.raises(SamplingError, match=sentence):
        run_job(replace(options, **changed))


@pytest.mark.parametrize(
    ("name", "value"), [("device", "tpu"), ("format", "gif"), ("dtype", "float64"), ("backend", "x")]
)
def test_names_that_do_not_exist_are_refused_before_anything_is_made(
    name: str, value: str, options: SampleOptions
) -> None:
    with pytest.raises(ValueError, match=f"{name} '{value}' is not known; it must be one of [a-z]"):
        replace(options, **{name: value})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"step_size": (0.1, 0.2)}, "step_size has 2 values; a chain of 3 steps needs 1 or 3"),
        ({"step_size": ()}, "step_size has 0 values"),
        ({"step_size": (0.1, 0.2, -0.3)}, r"step_size is -0\.3; it must be a positive number"),
        ({"steps": -1}, "steps is -1"),
        ({"start_temperature": -1.0}, r"start_temperature is -1\.0; it must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite and at least 0"),
        ({"energy": None}, "steps need an energy network: give --energy, or --steps 0"),
    ],
)
def test_what_makes_no_chain_is_told_before_anything_is_made(
    given: dict[str, Any], sentence: str, options: SampleOptions
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_job(replace(options, **given))
    assert not options.out.exists()


# The NVAE alone.
def test_without_steps_no_energy_network_is_needed_and_a_given_one_changes_nothing(
    options: SampleOptions, alone: SampleOptions
) -> None:
    made = images(alone)
    assert np.array_equal(made, of_bare_sampler(tiny_model(), steps=0, step_size=1.0))
    assert manifest(alone).keys().isdisjoint({"energy", "step_size", "potential"})
    (alone.out / "samples.npy").unlink()
    unread = replace(alone, energy=Path("missing"), step_size=0.1, potential="paper")
    assert np.array_equal(images(unread), made)


@pytest.mark.parametrize(("likelihood", "channels"), [("gaussian", 3), ("logistic_mixture", 3), ("bernoulli", 1)])
def test_of_all_kinds_of_pixels_the_nvaes_own_samples_are_the_plain_modules_means(
    likelihood: Likelihood, channels: int, options: SampleOptions, alone: SampleOptions, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = NVAE(replace(TINY_NVAE, likelihood=likelihood, image_channels=channels)).eval()
    save_nvae(vae, tmp_path / "nvae")
    sampler = LangevinSampler(FrozenNVAE(vae, torch.float32, "auto"), steps=0, step_size=())
    eps_z, _ = vae.noise_layout.split(sampler.start(range(10)))
    with torch.no_grad():
        plain = vae.pixels(vae.decode(eps_z, 1.2).logits).mean_image()
    made = images(replace(alone, nvae=tmp_path / "nvae", temperature=1.2)).astype(int)
    assert made.std() > 1 and int(np.abs(made - to_uint8(plain).numpy()).max()) <= 1


def test_a_frozen_nvae_knows_when_it_is_stale_and_that_it_has_no_energy() -> None:
    vae = tiny_model().vae
    frozen = FrozenNVAE(vae, torch.float32, "auto")
    sampler = LangevinSampler(frozen, steps=0, step_size=())
    before = sampler.run([0]).images
    with torch.no_grad():
        vae.prior_ftr0.add_(1)
    with pytest.raises(StaleWeightsError):
        sampler.run([0])
    frozen.refresh()
    assert not torch.equal(sampler.run([0]).images, before)
    with pytest.raises(ValueError, match="steps need an energy network, and this model is an NVAE alone"):
        LangevinSampler(frozen, steps=1, step_size=0.1)


def test_an_energy_arch_of_no_blocks_is_refused_and_blocks_are_for_the_nvaes_side(
    options: SampleOptions, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nothing in ("", " , "):
        with pytest.raises(CheckpointError, match=f"{nothing!r} is not an energy network; use mnist, cifar_32"):
            load_energy(networks[1], arch=nothing)
    asked: list[Any] = []

    def load(path: Path, **others: Any) -> Any:
        asked.append((others["arch"], others["image_size"]))
        return load_energy(path)

    monkeypatch.setattr(job, "load_energy", load)
    for arch in (None, "celeba_64", "celeba64", "1-1d 1-2"):
        assert run_job(replace(options, energy_arch=arch)) == 0
    assert asked == [(None, None), ("celeba_64", None), ("celeba64", None), ("1-1d 1-2", 4)]


# Folders of older releases, and of other machines.
def of_older_release(options: SampleOptions, model: Any) -> None:
    """Leave the manifest that was written before there was a temperature of the start."""
    written = {
        "batch_size": 4, "threads": manifest(options)["threads"], "images_version": 1,
        "nvae": content_sha256(model.vae), "energy": content_sha256(model.energy), "seeds": "0-9",
        "steps": options.steps, "step_size": 0.05, "potential": "official", "temperature": 1.0, "dtype": "float32",
        "device": "cpu", "backend": manifest(options)["backend"], "format": "npy",
    }  # fmt: skip
    (options.out / "manifest.json").write_text(json.dumps(written, indent=2) + "\n")
    (options.out / "samples.npy").unlink()


def test_a_folder_of_an_older_release_is_completed_with_the_same_settings_only(
    options: SampleOptions, alone: SampleOptions
) -> None:
    made = images(options)
    of_older_release(options, tiny_model())
    with pytest.raises(SamplingError, match=r"start_temperature was 1\.0 and is 0\.9"):
        run_job(replace(options, start_temperature=0.9))
    assert np.array_equal(images(options), made)
    alone = replace(alone, out=options.out / "alone")
    made = images(alone)
    of_older_release(alone, tiny_model())
    assert np.array_equal(images(alone), made), "at no steps, also without the energy network that it names"


def test_going_on_with_another_torch_or_gpu_is_warned_of_where_something_is_missing(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_job(options) == 0
    assert manifest(options)["made_with"].startswith(f"torch {torch.__version__}, CPU with ")
    monkeypatch.setattr(plan, "_made_with", lambda device: "torch 99")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_job(options) == 0
    (options.out / "samples.npy").unlink()
    with pytest.warns(
        UserWarning, match=r"was started with torch .* and continues with torch 99; new images may differ"
    ):
        assert run_job(options) == 0


# What goes wrong.
def test_a_disk_that_is_full_for_the_journal_is_told_with_its_name(tmp_path: Path) -> None:
    where = folder.Folder(tmp_path)
    where.prepare()
    (where.state / "journal.0.jsonl").symlink_to("/dev/full")
    sentence = r"journal\.0\.jsonl: No space left on device; fix that, then run the same command again"
    with pytest.raises(SamplingError, match=sentence):
        Journal(where, 0).add(Record(0, images=1, computed_at_once=1, files={}))
    where.release()


def test_temporaries_that_cannot_be_removed_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".job" / "tmp").mkdir(parents=True)
    (tmp_path / ".job" / "tmp" / ".nfs0001").touch()
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *_, **__: None)
    where = folder.Folder(tmp_path)
    where.prepare()
    where.release()


def test_a_job_whose_journals_do_not_all_show_is_not_called_complete(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, which shows a folder's new entries late."""
    read = journal.read
    monkeypatch.setattr(journal, "read", lambda where: read(where)[:2])
    with pytest.raises(
        SamplingError, match=r"shows records of only 2 of 3 finished blocks; .* then run the same command again"
    ):
        run_job(options)
    assert not (options.out / "samples.npy").exists()
    monkeypatch.undo()
    assert run_job(options) == 0


def test_the_product_of_a_complete_job_is_read_once(options: SampleOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_job(options) == 0
    hashed: list[str] = []
    is_intact = folder.Folder.is_intact
    monkeypatch.setattr(
        folder.Folder, "is_intact", lambda self, name, sha256: hashed.append(name) or is_intact(self, name, sha256)
    )
    whole = images_in(options.out)
    assert run_job(options) == 0 and images_in(options.out) == whole
    assert hashed.count("samples.npy") == 1


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_block_is_halved_for_a_gpus_memory_and_for_the_hosts_and_for_nothing_else() -> None:
    def computing(error: RuntimeError) -> BlockSampler:
        def run(seeds: list[int], nonfinite: str) -> Chains:
            if len(seeds) > 1:
                raise error
            return Chains(torch.empty(0), torch.empty(0), torch.zeros(1, 1, 2, 2))

        sampler: Any = SimpleNamespace(run=run, device=torch.device("cpu"))
        return BlockSampler(sampler, 4)

    of_gpu = torch.OutOfMemoryError("CUDA out of memory.")
    of_host = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    for error in (of_gpu, of_host):
        assert computing(error).run(0, range(4)).computed_at_once == 1
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        computing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).run(0, range(4))


def test_where_not_even_the_probe_fits_an_automatic_batch_is_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler: Any = SimpleNamespace(
        noise_layout=SimpleNamespace(image_shape=(3, 256, 256)), device=torch.device("cuda"),
        model=None, step_sizes=(0.1,), potential="paper",
    )  # fmt: skip
    monkeypatch.setattr(blocks, "LangevinSampler", lambda *_, **__: SimpleNamespace(run=out_of_memory))
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    assert automatic_batch_size(sampler, 50_000) == 1


def test_a_device_that_does_not_take_the_networks_is_told_in_one_line(
    options: SampleOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "load_nvae", out_of_memory)
    assert command.run(lambda _: run_job(options), ()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: One image does not fit in memory: free") and error.count("\n") == 1


def test_an_interruption_is_passed_on_once_to_processes_that_hear_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's Ctrl-C reaches every process: they would get it a second time, in the middle of their ending."""
    told: list[tuple[int, int]] = []
    joins = iter([False, KeyboardInterrupt, False, True])

    def join(grace_period: float) -> bool:
        outcome = next(joins)
        if outcome is KeyboardInterrupt:
            raise KeyboardInterrupt
        return bool(outcome)

    def start_processes(*_: Any, **__: Any) -> Any:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "which new processes inherit"
        return SimpleNamespace(join=join, processes=[SimpleNamespace(pid=pid) for pid in (101, 102)])

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ranks, "start_processes", start_processes)
    monkeypatch.setattr(ranks.os, "kill", lambda *arguments: told.append(arguments))
    assert ranks.start(lambda *_: 0, 2) == command.INTERRUPTED
    assert told == [(101, signal.SIGTERM), (102, signal.SIGTERM)]
    assert signal.getsignal(signal.SIGINT) is before


def test_more_seeds_than_a_job_can_list_are_refused() -> None:
    assert len(Seeds.parse(f"0-{MOST_SEEDS - 1}")) == MOST_SEEDS
    with pytest.raises(ValueError, match="100,000,001 seeds are too many for one folder"):
        Seeds.parse(f"0-{MOST_SEEDS - 1},{2**40}")


@pytest.mark.parametrize("made_at", [None, 0.8, 0.7])
def test_below_temperature_one_an_nvae_that_is_not_readjusted_is_told_of(
    made_at: float | None, options: SampleOptions, tmp_path: Path
) -> None:
    save_nvae(tiny_model().vae, tmp_path / "nvae", {"temperature": made_at} if made_at else None)
    colder = replace(options, nvae=tmp_path / "nvae", temperature=0.7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_job(colder) == 0
    told = [str(warning.message) for warning in caught if "readjust" in str(warning.message)]
    command = f"`vaebm-fast readjust {colder.nvae} --temperature 0.7` writes a readjusted NVAE."
    assert len(told) == (made_at != 0.7) and all(message.endswith(command) for message in told)
