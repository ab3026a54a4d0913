"""Laws of the chain: the update, chains that leave the numbers, schedules, and the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.builders import tiny_grey_model
from vaebm_fast.chain import langevin
from vaebm_fast.chain.langevin import LangevinSampler, NonFiniteChainError, langevin_chain, to_uint8
from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import POTENTIALS, NoiseLayout, Potential
from vaebm_fast.ops.langevin_update import langevin_update


class Bowl:
    """U = |eps|^2 / 2 in every potential: a chain model without networks."""

    device = torch.device("cpu")
    noise_layout = NoiseLayout([(3, 4, 5), (2, 8, 10)], (1, 60, 64))

    def potential_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        noise = [*eps_z, eps_x]
        return torch.stack([0.5 * (eps * eps).flatten(1).sum(1) for eps in noise]).sum(0), noise

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor:
        return eps_z[0].flatten(1).mean(1).sigmoid().reshape(-1, 1, 1, 1).expand(-1, *self.noise_layout.image_shape)


# The update.
@pytest.mark.parametrize("step_size", [0.3, 1.0, 3.0])
def test_stationary_variance_in_a_bowl_is_one_over_one_minus_a_quarter_step(step_size: float) -> None:
    eps = LangevinSampler(Bowl(), steps=60, step_size=step_size).run(range(16)).eps
    expected = 1 / (1 - step_size / 4)
    # 5 standard deviations of the estimates; elements are independent, and the start has decayed below 1e-8.
    assert abs(float(eps.var()) - expected) < 5 * expected * math.sqrt(2 / eps.numel())
    assert abs(float(eps.mean())) < 5 * math.sqrt(expected / eps.numel())


def test_a_chain_repeats_the_update_it_is_given_and_records_u_before_each_step() -> None:
    start, noise = torch.randn(2, 5), torch.randn(3, 2, 5)
    given, states = start.clone(), [start]

    def update(eps: Tensor, gradient: Tensor, *, draw: Tensor, nonfinite_at: Tensor, step_size: float) -> None:
        eps += -step_size / 2 * gradient + math.sqrt(step_size) * noise[int(draw) - 1]

    step_sizes = (0.1, 0.3, 0.2)
    final, potentials, _ = langevin_chain(
        lambda eps: (eps.square().sum(1), 2 * eps),
        start,
        update,
        step_sizes=step_sizes,
        on_step=lambda k, eps: states.append(eps.clone()),
    )
    assert torch.equal(start, given)
    for k, h in enumerate(step_sizes):
        expected = states[k] - h / 2 * 2 * states[k] + math.sqrt(h) * noise[k]
        torch.testing.assert_close(states[k + 1], expected)
        assert torch.equal(potentials[k], states[k].square().sum(1))
    assert torch.equal(final, states[3])


def test_draw_k_of_a_seed_is_the_noise_of_step_k_and_draw_zero_its_start() -> None:
    sampler = LangevinSampler(Bowl(), steps=2, step_size=0.5)
    keys = seed_tensor([5, 2**64 - 1])
    for stream in (Stream.CHAIN, Stream.TRAIN_CHAIN):
        expected = normal(keys, 0, stream, sampler.noise_layout.dim)
        for k in (1, 2):
            expected = expected - 0.25 * expected + math.sqrt(0.5) * normal(keys, k, stream, sampler.noise_layout.dim)
        for seeds in ([5, 2**64 - 1], keys):
            assert torch.equal(sampler.run(seeds, stream=stream).eps, expected)


def test_noise_of_a_chain_has_the_same_bits_in_any_batch_and_order() -> None:
    sampler = LangevinSampler(Bowl(), steps=3, step_size=0.5)
    seeds = [7, 0, 123456789, 3, 2**63]
    together = sampler.run(seeds).eps
    assert torch.equal(sampler.run(seeds[::-1]).eps.flip(0), together)
    assert torch.equal(torch.cat([sampler.run([seed]).eps for seed in seeds]), together)


def test_a_given_start_replaces_the_seeds_own() -> None:
    sampler = LangevinSampler(Bowl(), steps=1, step_size=0.5)
    own = sampler.start([1, 2])
    given = own.clone()
    assert torch.equal(sampler.run([1, 2], start=own).eps, sampler.run([1, 2]).eps)
    assert torch.equal(own, given), "the caller's start is not written to"
    moved = sampler.run([1, 2], start=own + 1).eps - sampler.run([1, 2]).eps
    torch.testing.assert_close(moved, torch.full_like(moved, 0.75))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_chain_notes_the_first_step_after_which_each_state_was_not_finite(bad: float) -> None:
    calls = 0

    def potential_and_grad(eps: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        gradient = torch.zeros_like(eps)
        gradient[4, 1] = bad if calls == 3 else 0
        gradient[1, 0] = bad if calls == 2 else 0
        return eps.sum(1), gradient

    update = partial(langevin_update, seeds=seed_tensor(range(6)), stream=0)
    course = langevin_chain(potential_and_grad, torch.zeros(6, 3), update, step_sizes=[0.1] * 5)
    assert course.nonfinite_at.tolist() == [-1, 2, -1, -1, 3, -1]
    assert calls == 5, "nobody looks before all steps are done"


# Chains that leave the numbers.
class Quartic(Bowl):
    """U = sum eps^4 / 4, where a step of h diverges from |eps| = 2 / sqrt(h) on."""

    noise_layout = NoiseLayout([(1, 2, 2)], (1, 2, 2))

    def potential_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        noise = [*eps_z, eps_x]
        return torch.stack([eps.pow(4).flatten(1).sum(1) / 4 for eps in noise]).sum(0), [eps.pow(3) for eps in noise]


UNSTABLE = LangevinSampler(Quartic(), steps=20, step_size=0.8)
SEEDS = list(range(2**63 - 12, 2**63 + 12))


def test_chains_that_leave_the_numbers_are_named_by_their_seeds() -> None:
    with pytest.raises(NonFiniteChainError, match="chains became non-finite, the first at step") as caught:
        UNSTABLE.run(SEEDS)
    error = caught.value
    assert 2 < len(error.images) < len(SEEDS)
    assert error.seeds == [SEEDS[position] for position in error.images]
    assert f"(seeds {error.seeds[:8]})" in str(error)
    fine = [seed for seed in SEEDS if seed not in error.seeds]
    assert bool(UNSTABLE.run(fine).eps.isfinite().all())
    for seed in error.seeds:
        with pytest.raises(NonFiniteChainError, match=rf"\(seeds \[{seed}\]\)"):
            UNSTABLE.run([seed])


@pytest.mark.parametrize("stream", [Stream.CHAIN, Stream.TRAIN_CHAIN])
def test_chains_that_leave_the_numbers_run_again_from_their_starts_with_a_tenth_of_the_step(stream: Stream) -> None:
    options: dict[str, Any] = dict(stream=stream, nonfinite="redo", trace_every=3)
    start = UNSTABLE.start(SEEDS, stream) * 1.2
    chains = UNSTABLE.run(SEEDS, start=start, **options)
    others = [position for position in range(len(SEEDS)) if position not in chains.redone]
    assert chains.redone and others and not chains.failed
    calm = LangevinSampler(Quartic(), steps=20, step_size=0.1 * 0.8)
    for sampler, rows in ((UNSTABLE, others), (calm, chains.redone)):
        alone = sampler.run([SEEDS[row] for row in rows], start=start[rows], stream=stream, trace_every=3)
        assert torch.equal(chains.eps[rows], alone.eps) and torch.equal(chains.images[rows], alone.images)
        assert torch.equal(chains.potentials[:, rows], alone.potentials)
        assert chains.trace is not None and alone.trace is not None
        for name in ("potentials", "gradient_norms", "images"):
            assert torch.equal(getattr(chains.trace, name)[:, rows], getattr(alone.trace, name))


def test_chains_that_leave_the_numbers_twice_are_reported_and_have_no_image() -> None:
    start = UNSTABLE.start(SEEDS)
    start[[3, 7], 0] = 100.0
    chains = UNSTABLE.run(SEEDS, start=start, nonfinite="redo")
    assert chains.failed == [3, 7] and set(chains.failed) < set(chains.redone)
    assert chains.images.isnan().flatten(1).all(1).nonzero().flatten().tolist() == [3, 7]
    assert chains.images.isfinite().flatten(1).all(1).sum() == len(SEEDS) - 2


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_samples_of_chains_that_left_the_numbers_are_those_of_the_redo_and_never_black_squares(batch_size: int) -> None:
    expected = UNSTABLE.run(SEEDS, nonfinite="redo")
    assert torch.equal(UNSTABLE.sample(SEEDS, batch_size), to_uint8(expected.images))
    hopeless = LangevinSampler(Quartic(), steps=40, step_size=5.0)
    failing = [SEEDS[position] for position in hopeless.run(SEEDS, nonfinite="redo").failed]
    fine = [seed for seed in SEEDS if seed not in failing]
    seeds = (fine + failing)[-len(failing) - 1 :]  # the first is fine
    with pytest.raises(NonFiniteChainError, match=r"non-finite twice, the second time with 0\.1 h") as caught:
        hopeless.sample(seeds, batch_size)
    first_batch = {1: seeds[1:2], 5: seeds[1:5], 64: failing}[batch_size]
    assert caught.value.seeds == first_batch == [seeds[position] for position in caught.value.images]


# Schedules, starts, traces.
def test_a_schedule_gives_every_step_its_own_size() -> None:
    sizes, keys = [0.5, 0.25, 0.125], seed_tensor([5, 6])
    chains = LangevinSampler(Bowl(), steps=3, step_size=sizes).run(keys)
    expected = normal(keys, 0, Stream.CHAIN, chains.eps.shape[1])
    for k, h in enumerate(sizes, start=1):
        expected = expected - h / 2 * expected + math.sqrt(h) * normal(keys, k, Stream.CHAIN, expected.shape[1])
    assert torch.equal(chains.eps, expected)
    assert torch.equal(LangevinSampler(Bowl(), steps=3, step_size=torch.tensor(sizes)).run(keys).eps, expected)
    same = LangevinSampler(Bowl(), steps=3, step_size=[0.5] * 3).run(keys).eps
    for one in (0.5, torch.tensor(0.5)):
        assert torch.equal(LangevinSampler(Bowl(), steps=3, step_size=one).run(keys).eps, same)


def test_start_temperature_scales_the_chains_own_start_and_no_given_one() -> None:
    plain, cold = (
        LangevinSampler(Bowl(), steps=1, step_size=0.5, start_temperature=start_temperature)
        for start_temperature in (1.0, 0.25)
    )
    start = plain.start([1, 2])
    assert torch.equal(cold.start([1, 2]), 0.25 * start)
    assert torch.equal(cold.run([1, 2]).eps, plain.run([1, 2], start=0.25 * start).eps)
    assert torch.equal(cold.run([1, 2], start=start).eps, plain.run([1, 2], start=start).eps)


@pytest.mark.parametrize("every", [1, 2, 9])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_trace_holds_potentials_gradient_norms_and_images_before_every_kth_step(
    potential: Potential, every: int
) -> None:
    model = tiny_grey_model()
    sampler = LangevinSampler(model, steps=5, step_size=1e-2, potential=potential, temperature=0.7)
    states = [sampler.start([4, 5])]
    chains = sampler.run([4, 5], trace_every=every, on_step=lambda k, eps: states.append(eps.clone()))
    trace = chains.trace
    assert trace is not None and trace.steps == list(range(1, 6, every))
    assert torch.equal(chains.eps, sampler.run([4, 5]).eps)
    for t, step in enumerate(trace.steps):
        eps_z, eps_x = sampler.noise_layout.split(states[step - 1])
        u, gradients = model.potential_and_grad(eps_z, eps_x, potential, 0.7)
        norms = sampler.noise_layout.join(gradients[:-1], gradients[-1]).norm(dim=1)
        torch.testing.assert_close(trace.potentials[t], u)
        torch.testing.assert_close(trace.gradient_norms[t], norms)
        torch.testing.assert_close(trace.images[t], model.mean_image(eps_z, 0.7).detach())


def test_no_trace_where_none_is_asked_for_and_an_empty_one_of_no_steps() -> None:
    assert LangevinSampler(Bowl(), steps=2, step_size=0.1).run([1]).trace is None
    trace = LangevinSampler(Bowl(), steps=0, step_size=0.1).run([1], trace_every=1).trace
    assert trace is not None and trace.steps == [] and trace.images.shape == (0, 1, *Bowl.noise_layout.image_shape)
    assert trace.potentials.shape == trace.gradient_norms.shape == (0, 1)


# The sampler.
def test_images_do_not_depend_on_the_batch() -> None:
    sampler = LangevinSampler(tiny_grey_model(), steps=4, step_size=1e-2)
    seeds = list(range(10, 17))
    together = sampler.run(seeds).images
    assert together.shape == (7, 1, 4, 4)
    assert float(together.std()) > 0.1
    for split in (1, 3):
        parts = [sampler.run(seeds[at : at + split]).images for at in range(0, 7, split)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampler.run(seeds[::-1]).images.flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_samples_are_the_mean_images_as_uint8_in_the_order_of_their_seeds(batch_size: int) -> None:
    sampler = LangevinSampler(tiny_grey_model(), steps=2, step_size=1e-2)
    images = sampler.sample((seed for seed in range(7)), batch_size)
    assert images.dtype == torch.uint8 and images.shape == (7, 4, 4, 1)
    expected = 255 * sampler.run(range(7)).images.permute(0, 2, 3, 1)
    assert float((images - expected).abs().max()) < 0.5 + 1e-2


def test_no_seeds_give_no_images() -> None:
    sampler = LangevinSampler(tiny_grey_model(), steps=2, step_size=1e-2)
    images = sampler.sample([])
    assert images.dtype == torch.uint8 and images.shape == (0, 4, 4, 1)
    assert sampler.run([]).potentials.shape == (2, 0)


def test_zero_steps_give_the_means_of_the_nvae_itself() -> None:
    model = tiny_grey_model()
    sampler = LangevinSampler(model, steps=0, step_size=1.0)
    chains = sampler.run([1, 2, 3])
    assert torch.equal(chains.eps, normal(seed_tensor([1, 2, 3]), 0, Stream.CHAIN, 26))
    assert chains.potentials.shape == (0, 3)
    eps_z, _ = sampler.noise_layout.split(chains.eps)
    mean = model.vae.pixels(model.vae.decode(eps_z).logits).mean
    torch.testing.assert_close(chains.images, mean.clamp(-1, 1) / 2 + 0.5)
    assert not chains.images.requires_grad


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_sampler_descends_its_potential_at_its_temperature(potential: Potential) -> None:
    model = tiny_grey_model()
    sampler = LangevinSampler(model, steps=1, step_size=1e-2, potential=potential, temperature=0.7)
    chains = sampler.run([4, 5])
    start = sampler.start([4, 5])
    u, gradients = model.potential_and_grad(*sampler.noise_layout.split(start), potential, 0.7)
    noise = normal(seed_tensor([4, 5]), 1, Stream.CHAIN, 26)
    expected = start - 0.5e-2 * sampler.noise_layout.join(gradients[:-1], gradients[-1]) + 0.1 * noise
    torch.testing.assert_close(chains.potentials, u[None])
    torch.testing.assert_close(chains.eps, expected)
    eps_z, _ = sampler.noise_layout.split(chains.eps)
    torch.testing.assert_close(chains.images, model.mean_image([0.7 * eps for eps in eps_z]).detach())


def test_uint8_is_255_times_the_image_rounded_and_never_rescaled() -> None:
    x = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 100 / 255, 1.0, 1.5, -0.2, 254.4 / 255]).reshape(1, 2, 2, 2)
    assert to_uint8(x).tolist() == [[[[0, 255], [0, 255]], [[1, 0], [100, 254]]]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": -1}, r"steps is -1; it must be 0 or more\."),
        ({"step_size": 0.0}, r"step_size is 0\.0; it must be a positive number\."),
        ({"step_size": math.nan}, r"step_size is nan; it must be a positive number\."),
        ({"step_size": math.inf}, r"step_size is inf; it must be a positive number\."),
        ({"steps": 0, "step_size": -1.0}, r"step_size is -1\.0; it must be a positive number\."),
        ({"steps": 2, "step_size": [0.1, math.nan]}, r"step_size is nan; it must be a positive number\."),
        ({"steps": 3, "step_size": [0.1, 0.2]}, r"step_size has 2 values; a chain of 3 steps needs 1 or 3\."),
        ({"temperature": math.nan}, r"temperature is nan; it must be finite and at least 0\."),
        ({"start_temperature": -0.1}, r"start_temperature is -0\.1; it must be finite and at least 0\."),
        ({"start_temperature": math.inf}, r"start_temperature is inf; it must be finite and at least 0\."),
        ({"potential": "exact"}, r"'exact' is not known; it must be one of energy, paper, official\."),
    ],
)
def test_settings_that_make_no_chain_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LangevinSampler(Bowl(), **{"steps": 1, "step_size": 0.1, **arguments})


def test_arguments_of_a_run_that_do_not_fit_are_refused() -> None:
    sampler = LangevinSampler(tiny_grey_model(), steps=1, step_size=0.1)
    for shape in ((1, 26), (2, 25)):
        with pytest.raises(ValueError, match=r"start has shape .*; 2 seeds of this model need \(2, 26\)\."):
            sampler.run([1, 2], start=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"nonfinite is 'ignore'; it must be one of raise, redo\."):
        sampler.run([1], nonfinite="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"trace_every is 0; it must be at least 1\."):
        sampler.run([1], trace_every=0)
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="batch_size is .*; it must be at least 1"):
            sampler.sample([1, 2], batch_size)


@pytest.mark.parametrize(
    ("device", "pairs", "chosen"),
    [("cuda", "cuda", "cuda"), ("cuda", "triton", "triton"), ("cuda", "reference", "auto"), ("cpu", "cuda", "auto")],
)
def test_on_a_gpu_noise_and_update_run_on_the_backend_of_the_pair(
    device: str, pairs: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(*arguments: Any, backend: str, **others: Any) -> Tensor:
        asked.append(backend)
        return torch.zeros(2, Bowl.noise_layout.dim)

    monkeypatch.setattr(langevin, "normal", noted)
    monkeypatch.setattr(langevin, "langevin_update", noted)
    model = Bowl()
    model.backend = pairs  # type: ignore[attr-defined]
    model.device = torch.device(device)
    sampler = LangevinSampler(model, steps=2, step_size=0.1, capture=False)
    sampler.device = torch.device("cpu")  # where the tensors are
    sampler.run(range(2))
    assert asked == [chosen] * 3
