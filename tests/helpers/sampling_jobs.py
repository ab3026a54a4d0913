"""Sampling jobs of a tiny model: its files, runs in processes of their own, and what a folder then holds."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers.builders import TINY_ENERGY, TINY_NVAE
from vaebm_fast.chain.langevin import LangevinSampler, to_uint8
from vaebm_fast.checkpoint import save_energy, save_nvae
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.runtime import command as commands
from vaebm_fast.runtime.ranks import Ranks
from vaebm_fast.sampling import SampleOptions, blocks, run_job
from vaebm_fast.sampling.blocks import BlockSampler
from vaebm_fast.sampling.job import run_rank

FORMATS = ("png", "zip", "tar", "npz", "npy")


def tiny_model(seed: int = 3) -> VAEBM:
    """4 x 4 pixels in colour; its images differ from seed to seed and from step to step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAEBM(NVAE(TINY_NVAE), EnergyNetwork(TINY_ENERGY)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
        model.energy.initialize_from_data(torch.rand(8, 3, 4, 4))
    head = model.vae.image_conditional[1]
    head.log_weight_norm.data += 2.5
    model.energy.linear.weight.data *= 50
    return model


def save_networks(folder: Path) -> tuple[Path, Path]:
    """The tiny model's two files."""
    model, nvae, energy = tiny_model(), folder / "nvae.safetensors", folder / "energy.safetensors"
    save_nvae(model.vae, nvae)
    save_energy(model.energy, energy)
    return nvae, energy


def options_for(networks: tuple[Path, Path], out: Path, **others: Any) -> SampleOptions:
    """A short job of ten images in batches of four, where `others` do not say otherwise."""
    nvae, energy = networks
    given = {"seeds": "0-9", "steps": 3, "step_size": 0.05, "batch_size": 4, "device": "cpu", "progress": False}
    return SampleOptions(nvae=nvae, energy=energy, out=out, **{**given, **others})


def run_apart(
    options: SampleOptions,
    ranks: Ranks | None = None,
    store: Path | None = None,
    before: Callable[[], None] | None = None,
) -> Any:
    """A process, just begun, that runs the job (`run_rank` where ranks are given) after `before`.

    It is a copy of this process, which has torch loaded already, and it ends as the command would.
    """

    def command(_: object) -> int:
        return run_job(options) if ranks is None else run_rank(options.resolve(), ranks, store)

    def main() -> None:
        if before is not None:
            before()
        code = commands.run(command, ())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # pytest's own exit handlers are not this process's

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def exit_code(process: Any) -> int:
    """Its exit code, once it has ended."""
    process.join(120)
    assert process.exitcode is not None, "the process did not end"
    return int(process.exitcode)


def run_ranks(options: SampleOptions, world: int, store: Path) -> list[int]:
    """The exit codes of a job of this many processes."""
    processes = [run_apart(options, Ranks(rank, world, rank, world), store) for rank in range(world)]
    return [exit_code(process) for process in processes]


def images_in(out: Path) -> dict[str, bytes]:
    """What a job leaves to its user, by name: everything but its bookkeeping and its summary, which has times in it."""
    files = [path for path in out.rglob("*") if path.is_file() and ".job" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != "summary.json"}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def options(networks: tuple[Path, Path], tmp_path: Path) -> SampleOptions:
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
