"""Both training stages beyond the golden cases: schedules, noise, resuming, the clip, the guard, readjustment."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vaebm_fast as vf
from tests.helpers.trainers import QUIET, SOURCE, TINY, TINY_ENERGY, energy_trainer, vae_trainer
from vaebm_fast import reference
from vaebm_fast.checkpoint import CheckpointError, describe, save_training
from vaebm_fast.config import PRESETS, ChainConfig, EnergyTraining, ReplayBuffer, VAETraining
from vaebm_fast.data import TorchLoader, digits
from vaebm_fast.models import NVAE
from vaebm_fast.models.nvae import bits_per_dim
from vaebm_fast.report import save_grid
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer, readjust, train
from vaebm_fast.training.energy import clip_by_second_moment
from vaebm_fast.training.guard import DivergedError, DivergenceGuard
from vaebm_fast.training.losses import balanced_kl, kl_alpha, kl_coeff, learning_rate
from vaebm_fast.training.readjust import (
    load_readjusted_nvae,
    readjust_batch_norm,
    readjust_file,
    readjusted_path,
)
from vaebm_fast.training.spectral import NORMALIZE_EPS, SpectralRegulariser


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_its_minimum() -> None:
    training = VAETraining(warmup_epochs=2, learning_rate=1e-2, learning_rate_min=1e-4)
    rates = [learning_rate(step, 100, 10, training) for step in range(101)]
    assert rates[:20] == pytest.approx([1e-2 * (step + 1) / 20 for step in range(20)])
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    assert all(before >= after for before, after in zip(rates[20:], rates[21:], strict=False))


def test_kl_is_plain_once_annealed_and_keeps_its_mean_weight_while_balanced() -> None:
    kl = torch.rand(8, 3) + 0.5
    alpha = kl_alpha([2, 1])
    assert torch.equal(balanced_kl(kl, 1.0, alpha), kl.sum(1))
    equal = torch.full((4, 3), 2.0)
    assert torch.allclose(balanced_kl(equal, 0.5, torch.ones(3)), 0.5 * equal.sum(1))
    assert kl_coeff(0, 100, 0.3, 1e-4, 1e-4) == 1e-4


def test_bits_per_dim_of_a_uniform_byte_is_eight() -> None:
    nats = torch.tensor([3 * 4 * 4 * math.log(256)])
    assert float(bits_per_dim(nats, (3, 4, 4))) == pytest.approx(8)


def test_first_spectral_call_makes_forty_power_steps_and_later_ones_four() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 5, 3))
    regulariser = SpectralRegulariser(conv, seed=3)
    shape = (5, 27)
    weight = conv[0].weight.detach().flatten(1)[None]
    u, v = regulariser._u[shape], regulariser._v[shape]
    u, v = reference.power_iteration(weight, u, v, iterations=40, eps=NORMALIZE_EPS)
    assert float(regulariser().detach()) == pytest.approx(float(u[0] @ weight[0] @ v[0]), rel=1e-6)
    u, v = reference.power_iteration(weight, u, v, iterations=4, eps=NORMALIZE_EPS)
    assert float(regulariser().detach()) == pytest.approx(float(u[0] @ weight[0] @ v[0]), rel=1e-6)


def test_a_spectral_regulariser_put_back_to_its_start_repeats_its_first_call() -> None:
    regulariser = SpectralRegulariser(nn.Sequential(nn.Conv2d(3, 5, 3)), iterations=1, first_iterations=1)
    start = regulariser.state_dict()
    first, second = float(regulariser().detach()), float(regulariser().detach())
    regulariser.load_state_dict(start)
    assert float(regulariser().detach()) == first != second


def test_spectral_gradient_is_that_of_the_largest_singular_value() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    SpectralRegulariser(conv, first_iterations=500)().backward()
    left, _, right = torch.linalg.svd(conv[0].weight.detach().flatten(1))
    expected = torch.outer(left[:, 0], right[0])
    assert torch.allclose(conv[0].weight.grad.flatten(1), expected, atol=1e-4)


def test_clip_leaves_the_first_step_alone_and_bounds_every_entry_later() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.999))
    parameter.grad = torch.tensor([1e6, 1.0, -1.0])
    clip_by_second_moment(optimizer)
    assert parameter.grad.tolist() == [1e6, 1.0, -1.0]
    parameter.grad = torch.tensor([1.0, 1.0, 1.0])
    optimizer.step()
    parameter.grad = torch.tensor([50.0, -50.0, 2.0])
    clip_by_second_moment(optimizer)
    # After one step with gradient 1, v / (1 - beta2) is 1, so the bound is 3.1.
    assert parameter.grad.tolist() == pytest.approx([3.1, -3.1, 2.0], rel=1e-5)


@pytest.mark.parametrize("make", [vae_trainer, energy_trainer], ids=["vae", "energy"])
def test_training_lowers_or_moves_its_loss_and_depends_on_the_seed_alone(make: object) -> None:
    first, second = make(), make()  # type: ignore[operator]
    for step in range(3):
        a, b = first.step(step), second.step(step)
        assert all(float(a[name]) == float(b[name]) for name in a)


def test_vae_training_improves_bits_per_dim() -> None:
    trainer = vae_trainer(kl_anneal_portion=0.01)
    scalars = [trainer.step(step) for step in range(trainer.total_steps)]
    assert float(scalars[-1]["bits_per_dim"]) < float(scalars[0]["bits_per_dim"])


def test_bits_per_dim_in_training_are_those_of_the_pixels_that_count() -> None:
    config = replace(TINY, image_size=16, likelihood="bernoulli", uncounted_border=2)
    training = replace(PRESETS["digits"].vae_training, batch_size=8)
    scalars = VAETrainer(config, training, TorchLoader(digits(image_size=16), 8)).step(0)
    nats = float(scalars["reconstruction_loss"]) + float(scalars["kl"])
    assert float(scalars["bits_per_dim"]) == pytest.approx(nats / (12 * 12 * math.log(2)))


def test_mixed_precision_keeps_densities_in_float32() -> None:
    """bfloat16 has 8 bits: its densities would be off by percents, those of a bfloat16 network alone are not."""
    exact, mixed = vae_trainer(mixed_precision=False), vae_trainer(mixed_precision=True)
    for step in range(2):
        a, b = exact.step(step), mixed.step(step)
        for name in ("reconstruction_loss", "kl"):
            assert isinstance(b[name], Tensor) and b[name].dtype == torch.float32
            assert float(b[name]) == pytest.approx(float(a[name]), rel=0.05)
    x = torch.rand(2, *TINY.image_shape)
    with torch.autocast("cpu", torch.bfloat16):
        elbo = mixed.vae.elbo(x)
    assert elbo.kl.dtype == elbo.log_q.dtype == elbo.reconstruction_loss.dtype == torch.float32


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("stage", ["vae", "energy", "energy with buffer", "energy with bfloat16 buffer"])
def test_resuming_is_bit_equal_to_never_stopping(tmp_path: Path, stage: str) -> None:
    def make() -> VAETrainer | EnergyTrainer:
        if stage == "vae":
            return vae_trainer()
        if stage == "energy":
            return energy_trainer()
        buffer = ReplayBuffer(size=20, max_probability=0.6, anneal_steps=2)
        return energy_trainer(buffer=replace(buffer, dtype="bfloat16") if "bfloat16" in stage else buffer)

    whole = train(make(), RunOptions(tmp_path / "whole", save_every=2, **QUIET))
    broken = make()
    step_of = broken.step

    def step_until_four(step: int) -> object:
        if step == 4:
            raise _Interrupt
        return step_of(step)

    broken.step = step_until_four  # type: ignore[method-assign, assignment]
    options = RunOptions(tmp_path / "resumed", save_every=2, **QUIET)
    with pytest.raises(_Interrupt):
        train(broken, options)
    resumed = train(make(), options)
    assert whole is not None and resumed is not None
    assert whole.read_bytes() == resumed.read_bytes()
    whole_log, resumed_log = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert whole_log.read_text() == resumed_log.read_text()


def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    options = RunOptions(tmp_path, save_every=2, **QUIET)
    train(vae_trainer(), options)
    with pytest.raises(CheckpointError, match="weight_decay"):
        train(vae_trainer(weight_decay=0.5), options)


def test_a_non_finite_scalar_stops_training_and_is_named(tmp_path: Path) -> None:
    trainer = vae_trainer()
    with torch.no_grad():
        trainer.vae.stem.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(trainer, RunOptions(tmp_path, **QUIET))


class _Counter:
    """A trainee whose state is one number."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_guard_rolls_back_to_the_older_snapshot_and_gives_up_in_the_end() -> None:
    trainee = _Counter()
    guard = DivergenceGuard(trainee, max_gap=10, max_rollbacks=1, interval=5)
    for step in range(12):
        guard.before_step(step)
        trainee.value = step
        assert not guard.after_step(step, gap=1.0)
    guard.before_step(12)
    assert guard.after_step(12, gap=float("nan"))
    assert trainee.value == 4  # the snapshot before step 5, not the one before step 10
    guard.before_step(13)
    with pytest.raises(DivergedError, match="step 13"):
        guard.after_step(13, gap=1e9)
    assert trainee.value == 4


def test_guard_forgives_one_spike() -> None:
    guard = DivergenceGuard(_Counter(), max_gap=10, max_rollbacks=0)
    for step in range(20):
        guard.before_step(step)
        assert not guard.after_step(step, gap=50.0 if step == 10 else 1.0)


def test_energy_training_rolls_back_a_diverging_run() -> None:
    trainer = energy_trainer(max_energy_gap=1e-6)
    with pytest.warns(UserWarning, match="diverged at step 0"):
        scalars = trainer.step(0)
    assert set(scalars) == {"learning_rate", "rollbacks"}  # those of the step itself are no longer true
    assert trainer.update.optimizer.param_groups[0]["lr"] == trainer.training.learning_rate / 2


def test_chains_start_from_the_buffer_with_the_annealed_probability() -> None:
    trainer = energy_trainer(buffer=ReplayBuffer(size=64, max_probability=0.6, anneal_steps=100))
    assert trainer.buffer is not None
    latent = trainer.sampler.noise_layout.latent_dim
    trainer.buffer.push(torch.full((64, latent), 100.0))
    steps = range(50, 450)
    reused = [(trainer.start(step)[:, :latent] == 100).all(dim=1) for step in steps]
    early, late = torch.stack(reused[:50]).float().mean(), torch.stack(reused[50:]).float().mean()
    assert float(late) == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 2800))
    assert float(early) == pytest.approx(0.6 * 0.745, abs=4 * math.sqrt(0.25 / 400))
    fresh = trainer.start(200)[:, latent:]
    assert float(fresh.abs().max()) < 7


def test_a_chain_starts_as_its_own_seed_says_whatever_the_batch() -> None:
    """So that processes, whose chains have other seeds, choose otherwise."""
    buffer = ReplayBuffer(size=64, max_probability=0.5, anneal_steps=0)
    small, large = (energy_trainer(buffer=buffer) for _ in range(2))
    large.training = replace(large.training, batch_size=16)
    for trainer in (small, large):
        assert trainer.buffer is not None
        trainer.buffer.push(torch.arange(64.0)[:, None].expand(-1, trainer.sampler.noise_layout.latent_dim))
    halves = torch.cat([small.start(2), small.start(3)])
    assert torch.equal(halves, large.start(1))
    assert 0 < int((halves[:, 0] == halves[:, 0].round()).sum()) < 16  # some, not all, are the buffer's


def test_where_the_buffer_lies_is_no_setting_of_a_run_and_what_it_keeps_is() -> None:
    def settings(**changes: object) -> object:
        trainer = energy_trainer(buffer=ReplayBuffer(size=8))
        trainer.training = replace(trainer.training, buffer=ReplayBuffer(size=8, **changes))
        return trainer.settings()

    assert settings() == settings(placement="host") != settings(dtype="bfloat16")


def test_averaged_network_is_exported_and_zero_decay_exports_the_last_weights(tmp_path: Path) -> None:
    last = energy_trainer(ema_decay=0.0)
    path = train(last, RunOptions(tmp_path / "last", **QUIET))
    assert path is not None
    loaded = vf.load_energy(path)
    for name, tensor in last.model.energy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    averaged = energy_trainer(ema_decay=0.9)
    averaged.step(0)
    start = averaged.update.averaged.linear.weight.clone()
    averaged.step(1)
    expected = 0.9 * start + 0.1 * averaged.model.energy.linear.weight
    assert torch.allclose(averaged.update.averaged.linear.weight, expected, atol=1e-7)


def test_metrics_are_json_lines_with_every_scalar(tmp_path: Path) -> None:
    trainer = vae_trainer()
    train(trainer, RunOptions(tmp_path, **QUIET), save_grid)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, trainer.total_steps + 1))
    assert {"loss", "bits_per_dim", "kl", "spectral", "batchnorm", "kl_coeff", "learning_rate"} <= set(records[0])
    assert list((tmp_path / "tensorboard").iterdir())
    assert list((tmp_path / "samples").glob("*.png"))


def fresh_nvae() -> NVAE:
    torch.manual_seed(1)
    return NVAE(TINY).eval()


def test_readjustment_converges_to_the_statistics_of_the_decoder_at_that_temperature() -> None:
    vae = fresh_nvae()
    encoder_before = vae.pre_process[0]._ops[0].bn_act.running_var.clone()
    readjust_batch_norm(vae, 0.5, batches=200, batch_size=32)
    assert not vae.training
    first = vae.dec_tower[1]._ops[0].conv[1].bn  # sees the top combiner's output, upsampled
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vae.decode([torch.randn(4096, *shape) for shape in vae.latent_shapes], 0.5)
    hook.remove()
    assert torch.allclose(first.running_mean, seen[0].mean(dim=(0, 2, 3)), atol=0.05)
    assert torch.allclose(first.running_var, seen[0].var(dim=(0, 2, 3)), rtol=0.15)
    assert torch.equal(vae.pre_process[0]._ops[0].bn_act.running_var, encoder_before)


def test_readjustment_that_turns_non_finite_is_named_and_undone() -> None:
    vae = fresh_nvae()
    before = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    with torch.no_grad():
        vae.prior_ftr0.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="running_mean"):
        readjust_batch_norm(vae, 0.7, batches=3)
    assert all(torch.equal(before[name], buffer) for name, buffer in vae.named_buffers())


@pytest.mark.parametrize("temperature", [1.5, 1.0, 0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_below_one_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}; .* above 0 and below 1"):
        readjust_batch_norm(fresh_nvae(), temperature)


@pytest.mark.parametrize("batches", [0, -1])
def test_a_readjustment_without_batches_is_refused_and_leaves_the_good_one(batches: int, tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    vf.save_nvae(fresh_nvae(), path)
    load_readjusted_nvae(path, 0.7, batches=2)
    kept = readjusted_path(path, 0.7).read_bytes()
    with pytest.raises(ValueError, match=f"batches is {batches}"):
        load_readjusted_nvae(path, 0.7, batches=batches)
    assert readjusted_path(path, 0.7).read_bytes() == kept


def test_readjusted_file_is_made_once_and_again_when_the_weights_change(tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    vf.save_nvae(fresh_nvae(), path)
    first = load_readjusted_nvae(path, 0.7, batches=2)
    cache = tmp_path / "nvae.bn-t0.7.safetensors"
    written = cache.stat().st_mtime_ns
    again = load_readjusted_nvae(path, 0.7, batches=2)
    assert cache.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    other = fresh_nvae()
    with torch.no_grad():
        other.prior_ftr0.mul_(2)
    vf.save_nvae(other, path)
    load_readjusted_nvae(path, 0.7, batches=2)
    assert cache.stat().st_mtime_ns > written


def test_resuming_energy_training_with_another_nvae_is_refused(tmp_path: Path) -> None:
    def trainer(seed: int) -> EnergyTrainer:
        torch.manual_seed(seed)
        training = replace(
            PRESETS["digits"].energy_training, iterations=2, batch_size=8, chain=ChainConfig(1, 0.15, "paper")
        )
        return EnergyTrainer(NVAE(TINY), TINY_ENERGY, training, TorchLoader(SOURCE, 8))

    train(trainer(0), RunOptions(tmp_path, **QUIET))
    with pytest.raises(CheckpointError, match="nvae_sha256"):
        train(trainer(1), RunOptions(tmp_path, **QUIET))


def test_divergence_for_good_exports_the_last_good_network(tmp_path: Path) -> None:
    trainer = energy_trainer(max_energy_gap=1e-6, max_rollbacks=0)
    with pytest.raises(DivergedError):
        train(trainer, RunOptions(tmp_path, **QUIET))
    exported = vf.load_energy(tmp_path / "energy.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in exported.state_dict().values())


def test_a_garbled_log_does_not_stop_a_run(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    train(energy_trainer(), RunOptions(tmp_path, **QUIET))
    whole = log.read_text()
    log.write_text(whole + '{"step": 3, "lo\n\x00\x00garbage\n[1, 2]\n')
    train(energy_trainer(), RunOptions(tmp_path, **QUIET))
    assert log.read_text() == whole


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"chain": ChainConfig(0, 1.0)}, {"beta1": 1.0}, {"buffer": ReplayBuffer(size=4)}]
)
def test_settings_that_cannot_train_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EnergyTraining(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"dtype": "float16"}, {"placement": "disk"}, {"size": 0}, {"max_probability": 1.5}])
def test_settings_that_no_buffer_can_have_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReplayBuffer(**wrong)  # type: ignore[arg-type]


def test_a_chain_is_saved_flat_so_that_checkpoints_of_older_versions_continue() -> None:
    settings = energy_trainer().settings()
    assert (settings["steps"], settings["step_size"], settings["potential"]) == (2, 0.15, "paper")
    assert "chain" not in settings


def test_a_readjusted_network_is_returned_even_if_it_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "nvae.safetensors"
    vf.save_nvae(fresh_nvae(), path)
    expected = load_readjusted_nvae(path, 0.7, batches=2)
    readjusted_path(path, 0.7).unlink()
    readjusted_path(path, 0.7).mkdir()
    with pytest.warns(UserWarning, match="The readjusted NVAE is not kept for later: .*bn-t0.7.safetensors"):
        found = load_readjusted_nvae(path, np.float32(0.7), batches=np.int64(2))  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_a_readjustment_that_could_not_be_written_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nvae.safetensors"
    vf.save_nvae(fresh_nvae(), path)
    readjust_file(path, tmp_path / "out.safetensors", 0.7, batches=2)
    written = (tmp_path / "out.safetensors").read_bytes()
    monkeypatch.setattr(readjust, "readjust_batch_norm", None)
    readjust_file(path, tmp_path / "out.safetensors", 0.7, batches=2)  # it is there
    with pytest.raises(OSError) as raised:
        readjust_file(path, tmp_path / "no" / "out.safetensors", 0.7, batches=2)
    assert raised.value.filename == str(tmp_path / "no" / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == written


def test_a_readjustment_replaces_neither_its_source_nor_another_file(tmp_path: Path) -> None:
    path, other = tmp_path / "nvae.safetensors", tmp_path / "other"
    vf.save_nvae(fresh_nvae(), path)
    other.write_text("precious")
    before = path.read_bytes()
    for out, sentence in ((path, "is the NVAE to readjust"), (other, "exists already; .*--overwrite")):
        with pytest.raises(ValueError, match=f"{out} {sentence}"):
            readjust_file(path, out, 0.7, batches=1)
    with pytest.raises(ValueError, match="is the NVAE to readjust"):
        readjust_file(path, path, 0.7, batches=1, overwrite=True)
    assert path.read_bytes() == before and other.read_text() == "precious"
    readjust_file(path, other, 0.7, batches=1, overwrite=True)
    with pytest.raises(ValueError, match="exists already"):
        readjust_file(path, other, 0.7, batches=2)
    cache = readjusted_path(path, 0.7)
    cache.write_text("damaged")
    readjust_file(path, cache, 0.7, batches=1)  # the default name needs no permission
    readjust_file(path, cache.parent / "." / cache.name, 0.7, batches=2)
    assert describe(cache)["info"]["batches"] == 2


def test_only_an_nvae_is_readjusted(tmp_path: Path) -> None:
    save_training({"step": 1}, tmp_path / "training.safetensors")
    with pytest.raises(ValueError, match="holds a training state, not an NVAE"):
        load_readjusted_nvae(tmp_path / "training.safetensors", 0.7)
