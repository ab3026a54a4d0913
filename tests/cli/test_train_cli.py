"""The command line of `train.py`: presets, options, errors, stopping and resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vaebm_fast import cli
from vaebm_fast.checkpoint import load_energy, load_nvae, save_nvae
from vaebm_fast.cli import train
from vaebm_fast.config import (
    CELL_PLANS,
    PRESETS,
    ChainConfig,
    EnergyConfig,
    EnergyTraining,
    NVAEConfig,
    ReplayBuffer,
    VAETraining,
    parse_blocks,
)
from vaebm_fast.data import TorchLoader
from vaebm_fast.data.resident import ResidentLoader
from vaebm_fast.models import NVAE
from vaebm_fast.runtime.devices import choose_device
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer

REPOSITORY = Path(__file__).resolve().parents[2]

TINY_NVAE = replace(PRESETS["digits"].nvae, num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1)
TINY_VAE_OPTIONS = (
    *("--model.num-channels-enc", "4", "--model.num-channels-dec", "4", "--model.num-groups-per-scale", "1"),
    *("--training.epochs", "1", "--training.batch-size", "128"),
)
TINY_ENERGY_OPTIONS = ("--energy.width", "4", "--training.chain.steps", "2", "--training.batch-size", "16")


@dataclass(frozen=True)
class Stage:
    """A short run of one stage without --out: command line, class, steps and exported file."""

    arguments: tuple[str, ...]
    trainer: type[VAETrainer] | type[EnergyTrainer]
    total_steps: int
    exported: str


@pytest.fixture(scope="module")
def nvae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvae") / "nvae.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_nvae(NVAE(TINY_NVAE), path)
    return path


@pytest.fixture(params=["vae", "energy"])
def stage(request: pytest.FixtureRequest, nvae_file: Path) -> Stage:
    common = (request.param, "--preset", "digits", "--no-progress")
    if request.param == "vae":
        return Stage((*common, *TINY_VAE_OPTIONS), VAETrainer, 898 // 128, "nvae.safetensors")
    options = ("--nvae", str(nvae_file), "--training.buffer", "--training.buffer.size", "32")
    arguments = (*common, *TINY_ENERGY_OPTIONS, *options, "--training.iterations", "6")
    return Stage(arguments, EnergyTrainer, 6, "energy.safetensors")


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, RunOptions]]:
    """The trainer and options that a command would run."""
    seen: list[tuple[Any, RunOptions]] = []

    def finish(trainer: Any, run: RunOptions) -> int:
        seen.append((trainer, run))
        return 0

    monkeypatch.setattr(train, "finish", finish)
    return seen


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line on stderr of a failing run."""
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """tyro's message for invalid arguments, without boxes and line breaks."""
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def option_names(prefix: str, kind: type) -> list[str]:
    """Options for the fields of `kind` except `chain`, which has its own option group."""
    return [f"--{prefix}{entry.name.replace('_', '-')}" for entry in fields(kind) if entry.type != "ChainConfig"]


@pytest.mark.parametrize(
    "stage_name, groups",
    [
        ("vae", {"model.": NVAEConfig, "training.": VAETraining, "": RunOptions}),
        (
            "energy",
            {
                "energy.": EnergyConfig,
                "training.": EnergyTraining,
                "training.chain.": ChainConfig,
                "training.buffer.": ReplayBuffer,
                "": RunOptions,
            },
        ),
    ],
)
def test_every_value_of_a_preset_and_of_a_run_is_an_option(
    stage_name: str, groups: dict[str, type], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(capsys, stage_name, "--preset", "celeba_256").split()
    wanted = [name for prefix, kind in groups.items() for name in option_names(prefix, kind)]
    assert [name for name in wanted if name not in shown and f"{name}," not in shown] == []


@pytest.mark.parametrize("form", [["--preset", "celeba_256"], ["--preset=celeba_256"]])
def test_help_shows_the_values_of_the_named_preset(form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    vae, energy = help_of(capsys, "vae", *form), help_of(capsys, "energy", *form)
    assert "--preset cifar10|celeba_64|" in vae and "(default: celeba_256)" in vae
    assert "--training.learning-rate FLOAT (default: 0.006)" in vae and "--model.image-size INT (default: 256)" in vae
    assert "--training.chain.step-size" in energy and "3e-06" in energy
    assert "--training.buffer.size INT (default: 2000)" in energy
    assert "(default: runs/celeba_256/energy)" in energy
    assert all(name in vae.replace(", ", ",") for name in CELL_PLANS)


def test_help_explains_every_option_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, "vae", "--preset", "digits")
    for name in option_names("", RunOptions):
        after = shown.split(name, 1)[1].split("(default", 1)[0]
        assert len(after.split()) > 3, name


def test_help_without_a_stage_names_both_and_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([]) == train.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train.py vae", "train.py energy", *PRESETS))


@pytest.mark.parametrize("name", PRESETS)
def test_without_other_options_a_run_is_the_preset(name: str) -> None:
    preset, common = train.start_options("vae", ["--preset", name])
    defaults = train.VAEOptions(**common, model=preset.nvae, training=preset.vae_training)
    options = train.parse("train.py vae", defaults, ["--preset", name, "--data", "here"])
    assert (options.preset, options.data) == (name, "here")
    assert (options.horizontal_flip, options.random_crop) == (preset.horizontal_flip, name == "lsun_church_64")
    assert (options.model, options.training) == (preset.nvae, preset.vae_training)
    assert options.run == RunOptions(Path("runs", name, "vae"))


def test_options_override_the_preset_and_the_rest_stays(trainers: list[Any]) -> None:
    arguments = ("--training.learning-rate", "1e-3", "--training.log-sigma-floor", "-2", "--seed", "7")
    assert (
        train.main(["vae", "--preset", "digits", *TINY_VAE_OPTIONS, *arguments, "--out", "o", "--log-every", "3"]) == 0
    )
    ((trainer, run),) = trainers
    assert trainer.config == TINY_NVAE and trainer.seed == 7
    assert trainer.training == replace(
        PRESETS["digits"].vae_training, epochs=1, batch_size=128, learning_rate=1e-3, log_sigma_floor=-2.0
    )
    assert run == RunOptions(Path("o"), log_every=3)
    assert not trainer.settings()["horizontal_flip"]


def test_energy_blocks_are_one_option(trainers: list[Any], nvae_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("energy", "--preset", "digits", "--nvae", str(nvae_file))
    assert train.main([*command, "--energy.blocks", "1-1d 1-3", "--energy.width", "2"]) == 0
    assert trainers[0][0].config == EnergyConfig(8, 1, 2, parse_blocks("1-1d 1-3"))
    assert "'1+1' is not of the form" in refusal_of(capsys, *command, "--energy.blocks", "1+1")
    assert "Block 1 takes 3 x width" in refusal_of(capsys, *command, "--energy.blocks", "1-2 3-4")


def test_the_replay_buffer_is_switched_by_one_option_and_set_by_others(
    trainers: list[Any], nvae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("energy", "--preset", "digits", "--nvae", str(nvae_file), *TINY_ENERGY_OPTIONS)
    assert train.main(command) == 0
    assert train.main([*command, "--training.buffer"]) == 0
    assert train.main([*command, "--training.buffer", "--training.buffer.size", "64"]) == 0
    assert [trainer.training.buffer for trainer, _ in trainers] == [None, ReplayBuffer(), ReplayBuffer(size=64)]
    rounded = ("--training.buffer", "--training.buffer.dtype", "bfloat16")
    assert train.main([*command, *rounded]) == 0
    assert trainers[-1][0].training.buffer == ReplayBuffer(dtype="bfloat16")
    assert [trainers[at][0].buffer.state_dict()["states"].dtype for at in (1, -1)] == [torch.float32, torch.bfloat16]
    assert "placement is host" in error_of(
        capsys, *command, "--device", "cpu", "--training.buffer", "--training.buffer.placement", "host"
    )
    too_large = error_of(capsys, *command, "--training.buffer", "--training.buffer.size", "1000000000000")
    assert "1000000000000 states" in too_large and "GB are free" in too_large
    assert "invalid choice" in refusal_of(capsys, *command, "--training.buffer.dtype", "float16")
    assert "add --training.buffer" in error_of(capsys, *command, "--training.buffer.size", "64")
    assert "--training.no-buffer" in help_of(capsys, "energy", "--preset", "lsun_church_64")


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    refused = refusal_of(capsys, "vae")
    assert "--preset cifar10|" in refused and "--data" not in refused
    refused = refusal_of(capsys, "energy", "--preset", "cifar10")
    assert "--data DATA" in refused and "--nvae FILE" in refused


def test_what_cannot_be_is_one_sentence(
    nvae_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = ("vae", "--preset", "digits", "--out", str(tmp_path))
    energy = ("energy", "--preset", "digits", "--out", str(tmp_path), "--nvae", str(nvae_file))
    assert "use one of vae, energy" in error_of(capsys, "nvae")
    assert all(name in error_of(capsys, "vae", "--preset", "cifar100") for name in ("cifar100", *PRESETS))
    assert "/nowhere does not exist" in error_of(capsys, *vae, "--data", "/nowhere")
    at_most = "batch_size is 10000; it must be at least 1 and at most 898, the size of digits, train half."
    assert at_most in error_of(capsys, *vae, "--training.batch-size", "10000")
    assert "/nowhere: there is no such file" in error_of(capsys, *energy, "--nvae", "/nowhere")
    sizes = error_of(capsys, *energy, "--energy.image-size", "16")
    assert "(1, 8, 8)" in sizes and "(1, 16, 16)" in sizes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in error_of(capsys, *vae, "--device", "cuda")
    assert "image_size 33 is not a multiple" in refusal_of(capsys, *vae, "--model.image-size", "33")
    assert "log_every is 0" in refusal_of(capsys, *vae, "--log-every", "0")
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for present, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert choose_device("auto").type == kind
        assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("processes, published, batch_size", [(8, 32, 32), (4, 4, 32)])
def test_another_batch_than_the_published_one_is_told(
    processes: int, published: int, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    train.compare_batches(processes, published, batch_size)
    said = capsys.readouterr().err
    assert said == f"Published: {processes} processes of {published} images; this run: 1 process of {batch_size}.\n"
    train.compare_batches(processes, published, processes * published)
    train.compare_batches(1, published, batch_size)
    assert capsys.readouterr().err == ""


def test_a_run_of_a_published_preset_says_what_it_differs_in(
    trainers: list[Any], tmp_path: Path, nvae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        Image.new("RGB", (8, 12), (number, 0, 0)).save(tmp_path / f"{number}.png")
    common = ("--preset", "celeba_256", "--data", str(tmp_path), "--device", "cpu", "--training.batch-size", "2")
    model = TINY_VAE_OPTIONS[:6]
    assert train.main(["vae", *common, *model, "--model.image-size", "32", "--random-crop"]) == 0
    assert capsys.readouterr().err == "Published: 8 processes of 8 images; this run: 1 process of 2.\n"
    assert trainers[0][0].settings()["random_crop"] and trainers[0][0].settings()["horizontal_flip"]
    energy = (
        "--nvae",
        str(nvae_file),
        "--energy.image-size",
        "8",
        "--energy.image-channels",
        "1",
        *TINY_ENERGY_OPTIONS,
    )
    blocks = ("--energy.blocks", "1-1d", "--training.no-buffer", "--training.batch-size", "2")
    assert train.main(["energy", *common, *energy, *blocks]) == 0
    assert capsys.readouterr().err == "Published: 4 processes of 4 images; this run: 1 process of 2.\n"
    assert not trainers[1][0].settings()["random_crop"]


def test_a_stopped_run_continues_to_the_same_bytes(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = ([*stage.arguments, "--out", str(tmp_path / name)] for name in ("whole", "stopped"))
    assert train.main(whole) == 0
    exported = tmp_path / "whole" / stage.exported
    assert f"The trained network is {exported}." in capsys.readouterr().out
    (load_nvae if stage.trainer is VAETrainer else load_energy)(exported)

    steps = []
    step_once = stage.trainer.step

    def step(self: Any, number: int) -> Any:
        if number == 2 and not steps[2:]:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(number)
        return step_once(self, number)

    monkeypatch.setattr(stage.trainer, "step", step)
    assert train.main(stopped) == 130
    assert "run the same command again" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / stage.exported).exists()
    assert train.main(stopped) == 0
    assert steps == list(range(stage.total_steps))  # none skipped or repeated
    assert (tmp_path / "stopped" / stage.exported).read_bytes() == exported.read_bytes()


def test_a_changed_setting_is_refused_by_name_and_a_damaged_state_by_file(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (*stage.arguments, "--out", str(tmp_path))
    assert train.main(command) == 0
    state = tmp_path / "training.safetensors"
    capsys.readouterr()
    error = error_of(capsys, *command, "--training.learning-rate", "0.5", "--seed", "3")
    assert "seed: 0 -> 3" in error and "learning_rate: " in error and "-> 0.5" in error and "epochs" not in error
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert f"{state}: the file is damaged" in error_of(capsys, *command)
    state.write_bytes(content[:1000])
    assert f"{state}: the file is truncated" in error_of(capsys, *command)


def test_vaebm_fast_train_is_the_same_command(
    trainers: list[tuple[Any, RunOptions]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train"]) == 0
    assert "vaebm-fast train energy --preset NAME" in capsys.readouterr().out
    arguments = ["vae", "--preset", "digits", *TINY_VAE_OPTIONS]
    assert cli.main(["train", *arguments]) == train.main(arguments) == 0
    (one, _), (other, _) = trainers
    assert one.settings() == other.settings()
    assert cli.main(["train", "flow"]) == 1
    assert "'flow' is not a training stage" in capsys.readouterr().err


def test_ctrl_c_in_a_terminal_saves_and_ends_with_130(tmp_path: Path) -> None:
    options = ("--training.epochs", "100000", "--log-every", "1", "--no-progress", "--out", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "train.py", "vae", "--preset", "digits", *TINY_VAE_OPTIONS, *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and not (log.exists() and log.read_text()):
            assert time.monotonic() < deadline, "not a single step in a minute"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error and "run the same command again" in out
    assert (tmp_path / "training.safetensors").exists()


def test_training_under_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "vae", "--preset", "digits"]) == 1
    assert "Training uses one process; start it without torchrun." in capsys.readouterr().err


def test_a_run_closes_its_loader_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(TorchLoader, "close", lambda self: closed.append(self))
    arguments = ["train", "vae", "--preset", "digits", *TINY_VAE_OPTIONS, "--out", str(tmp_path)]
    assert cli.main(arguments) == 0 and len(closed) == 1
    assert cli.main([*arguments, "--training.epochs", "2"]) == 1, "other settings"
    assert len(closed) == 2


def test_an_output_folder_within_the_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sample grids would become training images."""
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for index in range(8):
        Image.new("L", (8, 8), index).save(tmp_path / "images" / f"{index}.png")
    command = ["vae", "--preset", "digits", "--data", str(tmp_path / "images"), "--training.batch-size", "8"]
    for out in (tmp_path / "images" / "run", tmp_path / "link" / "run"):
        assert f"The output folder {out} lies in the data" in error_of(capsys, *command, "--out", str(out))
    assert sorted(path.suffix for path in (tmp_path / "images").iterdir()) == [".png"] * 8


def test_a_home_is_expanded_in_the_paths_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/images does not exist" in error_of(capsys, "vae", "--preset", "digits", "--data=~/images")
    common = ["energy", "--preset", "digits", "--nvae=~/n"]
    assert f"{tmp_path}/n: there is no such file" in error_of(capsys, *common)
    seen: list[Any] = []
    monkeypatch.setattr(train, "finish", lambda trainer, run: seen.append(run.out) or 0)
    assert train.main(["vae", "--preset", "digits", "--out=~/out"]) == 0 and seen == [tmp_path / "out"]


def test_loader_cache_and_transform_are_options(
    trainers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        Image.new("RGB", (178, 218), (number, 0, 0)).save(tmp_path / f"{number}.png")
    common = ("--preset", "celeba_64", "--data", str(tmp_path), "--device", "cpu", "--training.batch-size", "2")
    vae = ("vae", *common, *TINY_VAE_OPTIONS[:6], "--model.image-size", "32")
    assert train.main([*vae, "--cache", "device"]) == 0
    assert train.main([*vae, "--loader", "torch", "--cache", "none", "--transform", "square"]) == 0
    first, second = (trainer.loader for trainer, _ in trainers)
    assert isinstance(first, ResidentLoader) and first.settings()["transform"] == "celeba"
    assert type(second) is TorchLoader and second.settings()["transform"] == "square"
    assert second.source.cache_bytes == 0
    capsys.readouterr()
    assert "DALI decodes images on each read" in error_of(capsys, *vae, "--loader", "dali", "--cache", "host")
