"""Training failures: divergence, unreadable files, output folders of another run."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from tests.helpers.trainers import QUIET, energy_trainer, vae_trainer
from vaebm_fast.chain.langevin import NonFiniteChainError
from vaebm_fast.checkpoint import CheckpointError, load_training
from vaebm_fast.config import ReplayBuffer
from vaebm_fast.data.loader import UnreadableDataError
from vaebm_fast.report import save_grid
from vaebm_fast.report.figures import training_figure
from vaebm_fast.training import EnergyTrainer, RunOptions, loop, train
from vaebm_fast.training.guard import DivergedError


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def diverging_at(step: int, **changes: Any) -> EnergyTrainer:
    """A trainer whose chains become non-finite once, at one step."""
    trainer = energy_trainer(**changes)
    negatives = trainer.negatives

    def once(number: int) -> Tensor:
        if number == step:
            raise NonFiniteChainError([0], [7], "")
        return negatives(number)

    trainer.negatives = once  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("wrong, cause", [({"learning_rate": 1e30}, "weight_norm"), ({"step_size": 1e20}, "8 chains")])
def test_a_run_that_diverges_within_its_steps_is_rolled_back_and_exports_in_the_end(
    wrong: dict[str, float], cause: str, tmp_path: Path
) -> None:
    trainer = energy_trainer(**wrong, max_rollbacks=2)
    with pytest.warns(UserWarning, match=f"{cause}.*rolled back"), pytest.raises(DivergedError, match=cause):
        train(trainer, RunOptions(tmp_path, **QUIET))
    exported = vf.load_energy(tmp_path / "energy.safetensors").state_dict()
    assert all(tensor.isfinite().all() for tensor in exported.values())
    assert [record["rollbacks"] for record in records_of(tmp_path)] == [1, 2]


def test_weights_that_cannot_be_folded_are_rolled_back_and_the_buffer_is_emptied() -> None:
    trainer = energy_trainer(buffer=ReplayBuffer(size=16))
    trainer.step(0)
    assert trainer.buffer is not None and len(trainer.buffer) == 8
    with torch.no_grad():
        trainer.model.energy.linear.weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="not finite once folded"):
        scalars = trainer.step(1)
    assert scalars == {"learning_rate": trainer.training.learning_rate / 2, "rollbacks": 1}
    assert len(trainer.buffer) == 0
    assert trainer.model.energy.linear.weight.isfinite().all()
    after = trainer.step(2)
    assert after["rollbacks"] == 1 and math.isfinite(after["loss"])
    assert len(trainer.buffer) == 8


@pytest.mark.parametrize("name", ["loss", "spectral"])
def test_an_update_that_gives_what_is_not_finite_is_rolled_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = energy_trainer()
    update = trainer.update.__class__.__call__
    changed = {name: torch.tensor(math.nan)}
    monkeypatch.setattr(trainer.update.__class__, "__call__", lambda *given: {**update(*given), **changed})
    with pytest.warns(UserWarning, match=f"diverged at step 0 .{name} is nan"):
        assert trainer.step(0)["rollbacks"] == 1


def test_a_rolled_back_step_logs_what_is_true_and_the_run_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="diverged at step 2"):
        path = train(diverging_at(2), RunOptions(tmp_path / "energy", **QUIET))
    assert path is not None and vf.load_energy(path)
    records = records_of(tmp_path / "energy")
    rate = energy_trainer().training.learning_rate
    assert records[2] == {"step": 3, "learning_rate": rate / 2, "rollbacks": 1}
    assert ["loss" in record for record in records] == [True, True, False, True, True, True]
    assert [record["rollbacks"] for record in records] == [0, 0, 1, 1, 1, 1]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "metrics.jsonl").write_text('{"step": 1, "bits_per_dim": 2.0, "kl": 1.0}\n')
    training_figure(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 4])  # right after the rollback, when the buffer is empty, and one step later
def test_resuming_after_a_rollback_is_bit_equal_to_never_stopping(stop: int, tmp_path: Path) -> None:
    buffer = ReplayBuffer(size=12, max_probability=0.6, anneal_steps=2)
    with pytest.warns(UserWarning, match="diverged at step 2"):
        whole = train(diverging_at(2, buffer=buffer), RunOptions(tmp_path / "whole", save_every=1, **QUIET))
    broken, options = diverging_at(2, buffer=buffer), RunOptions(tmp_path / "resumed", save_every=1, **QUIET)
    step_of = broken.step

    def step_until(step: int) -> Any:
        if step == stop:
            raise _Interrupt
        return step_of(step)

    broken.step = step_until  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="diverged at step 2"), pytest.raises(_Interrupt):
        train(broken, options)
    resumed = train(energy_trainer(buffer=buffer), options)
    assert whole is not None and resumed is not None
    assert whole.read_bytes() == resumed.read_bytes()
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "resumed")


@pytest.mark.parametrize("when", ["before its last step", "by its last update"])
def test_a_checkpoint_never_holds_what_is_not_finite(when: str, tmp_path: Path) -> None:
    trainer = vae_trainer()
    step_of = trainer.step

    def step_once(step: int) -> Any:
        scalars = step_of(step)
        if step == 3 and when == "before its last step":  # the fourth step; the sixth is the next to be saved
            with torch.no_grad():
                trainer.vae.stem.weight.fill_(math.nan)
        return scalars

    def ruin(*_: object) -> None:
        if step_count() == 6:
            trainer.vae.stem.weight.data.fill_(math.nan)

    def step_count() -> int:
        return int(trainer.update.optimizer.state[trainer.vae.stem.weight]["step"])

    trainer.step = step_once  # type: ignore[method-assign]
    if when == "by its last update":
        trainer.update.optimizer.register_step_post_hook(ruin)
    with pytest.raises(FloatingPointError, match="at step 6"):
        train(trainer, RunOptions(tmp_path, progress=False, log_every=100, save_every=2, grid_every=100))
    state, _ = load_training(tmp_path / "training.safetensors")
    assert state["step"] == 4
    assert state["state"]["vae"]["stem.weight"].isfinite().all() == (when == "by its last update")


def test_an_unreadable_image_changes_no_state_of_energy_training() -> None:
    trainer = energy_trainer()
    trainer.step(0)
    before = copy.deepcopy(trainer.state_dict())

    def unreadable(step: int) -> Tensor:
        raise UnreadableDataError("gone")

    trainer.loader.batch = unreadable  # type: ignore[method-assign]
    with pytest.raises(UnreadableDataError):
        trainer.step(50)  # at which the guard takes a snapshot
    assert len(trainer.state_dict()["guard"]["snapshots"]) == len(before["guard"]["snapshots"])


def test_a_network_without_samples_is_told_of_and_trained_on(tmp_path: Path) -> None:
    trainer = energy_trainer()

    def no_samples() -> Tensor:
        raise NonFiniteChainError([0], [0], "")

    trainer.sample_images = no_samples  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="step_0000006.png was not drawn"):
        assert train(trainer, RunOptions(tmp_path, **QUIET), save_grid) is not None


def test_a_folder_of_the_other_stage_is_refused_by_stage_alone(tmp_path: Path) -> None:
    train(vae_trainer(), RunOptions(tmp_path, **QUIET))
    with pytest.raises(CheckpointError) as refused:
        train(energy_trainer(), RunOptions(tmp_path, **QUIET))
    message = str(refused.value)
    assert "a run of stage vae" in message and "this run is of stage energy" in message and "->" not in message


def test_of_many_settings_that_differ_three_are_shown(tmp_path: Path) -> None:
    train(vae_trainer(), RunOptions(tmp_path, **QUIET))
    names = ("learning_rate", "weight_decay", "kl_const_coeff", "kl_const_portion", "weight_decay_norm")
    with pytest.raises(CheckpointError) as refused:
        train(vae_trainer(**dict.fromkeys(names, 0.5)), RunOptions(tmp_path, **QUIET))
    message = str(refused.value)
    assert message.count("->") == 3 and "; and 2 more)" in message


def test_where_stderr_is_no_terminal_each_report_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"log_every": 3, "grid_every": 100}
    train(vae_trainer(), RunOptions(tmp_path / "lines", **options))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7"]
    losses = [record["loss"] for record in records_of(tmp_path / "lines")]
    assert [line.split()[3] for line in lines] == [f"{loss:.4g}," for loss in losses]
    assert "steps/s" in lines[0] and lines[-1].endswith("00:00 left")
    train(vae_trainer(), RunOptions(tmp_path / "silent", progress=False, **options))
    assert capsys.readouterr().err == ""


def test_a_checkpoint_from_before_a_setting_has_its_former_value() -> None:
    now, before = {"stage": "vae", "random_crop": False}, {"stage": "vae"}
    loop._require_same(now, before, Path("training.safetensors"))
    with pytest.raises(CheckpointError, match="random_crop: False -> True"):
        loop._require_same({**now, "random_crop": True}, before, Path("training.safetensors"))
