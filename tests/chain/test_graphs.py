"""What makes a chain capturable, and what capturing does to it, both shown without a GPU (see `capturing`)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import vaebm_fast as vf
from tests.helpers.capturing import Tape, emulate, launches, record, small_model
from vaebm_fast.chain import graphs, langevin
from vaebm_fast.chain.langevin import Chains, langevin_chain
from vaebm_fast.chain.noise import Stream, seed_tensor
from vaebm_fast.config import POTENTIALS, Potential
from vaebm_fast.frozen import StaleWeightsError
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.runtime import extension

BACKENDS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(not extension.is_available(), reason="not built")),
]


def sampler_of(backend: Any = "reference", **options: Any) -> vf.LangevinSampler:
    return vf.LangevinSampler(small_model().freeze(backend=backend), **{"steps": 4, "step_size": 1e-3, **options})


# What makes a chain capturable.
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_traces_without_values(backend: Any, potential: Potential) -> None:
    sampler = sampler_of(backend, steps=2, potential=potential)
    plan = langevin._Plan(int(Stream.CHAIN), sampler.step_sizes, trace_every=1)
    with FakeTensorMode(allow_non_fake_inputs=True), Tape() as tape:  # the weights are real
        keys, start = torch.empty(3, dtype=torch.int64), torch.empty(3, sampler.noise_layout.dim)
        outcome = sampler._chains(keys, start, plan)
    assert len(tape.entries) > 100
    assert all(isinstance(tensor, FakeTensor) for tensor in outcome)
    real = sampler._chains(seed_tensor(range(3)), sampler.start(range(3)), plan)
    assert [(t.shape, t.dtype) for t in outcome] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize(
    "look",
    [
        lambda eps: float(eps.sum()),
        lambda eps: eps[eps > 0],
        lambda eps: bool((eps > 0).any()),
        lambda eps: torch.equal(eps, eps),
        lambda eps: eps.nonzero(),
        lambda eps: torch.tensor(2.0),
    ],
)
def test_a_tape_refuses_what_asks_the_device(look: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="makes the host wait"), Tape():
        look(torch.ones(3))
    with pytest.raises(RuntimeError, match="makes the host wait"), FakeTensorMode(), Tape():
        look(torch.ones(3))


def steps_of(sampler: vf.LangevinSampler, update: Callable[..., None] = langevin_update) -> list[list[Any]]:
    """What each step of a chain launches, the draw's increment included."""
    keys = seed_tensor(range(2))
    start = sampler.start(keys)
    begins: list[int] = []
    ends: list[int] = []
    with Tape() as tape:

        def potential_and_grad(eps: Tensor) -> tuple[Tensor, Tensor]:
            begins.append(len(tape.entries))
            return sampler._potential_and_grad(eps)

        langevin_chain(
            potential_and_grad,
            start,
            partial(update, seeds=keys, stream=0, prior=sampler._has_prior),
            step_sizes=sampler.step_sizes,
            on_step=lambda k, eps: ends.append(len(tape.entries)),
        )
    # The tape keeps every tensor of every step, so that an address never stands for two of them.
    return [launches(tape.entries[begin:end]) for begin, end in zip(begins, ends, strict=True)]


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_consecutive_steps_launch_the_same_on_the_same_memory(backend: Any, potential: Potential) -> None:
    first, second, third = steps_of(sampler_of(backend, steps=3, potential=potential))
    assert len(first) > 100
    assert first == second == third


def test_steps_of_a_schedule_differ_in_the_size_that_the_update_gets_and_nothing_else() -> None:
    first, second = steps_of(sampler_of(steps=2, step_size=[1e-3, 2e-3]))
    assert len(first) == len(second)
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    update = "vaebm_fast.langevin_update" if extension.is_available() else "aten.mul"
    assert {str(launch[0].overloadpacket) for pair in differing for launch in pair} == {update}


def counting() -> Callable[..., None]:
    """An update with the step's number in Python."""
    step = 0

    def update(eps: Tensor, gradient: Tensor, **options: Any) -> None:
        nonlocal step
        step += 1
        langevin_update(eps, gradient * step, **options)

    return update


def remembering() -> Callable[..., None]:
    """An update that reads a tensor of the step before, in other memory each time."""
    before: list[Tensor] = []

    def update(eps: Tensor, gradient: Tensor, **options: Any) -> None:
        before.append(gradient.clone())
        langevin_update(eps, gradient + before[-2 if len(before) > 1 else -1], **options)

    return update


def changing() -> Callable[..., None]:
    """An update that launches something else from time to time."""
    calls: list[int] = []

    def update(eps: Tensor, gradient: Tensor, **options: Any) -> None:
        calls.append(1)
        langevin_update(eps, gradient.sin() if len(calls) % 2 else gradient.cos(), **options)

    return update


@pytest.mark.parametrize("fault", [counting, remembering, changing])
def test_the_comparison_of_steps_sees_what_lives_in_python(fault: Callable[[], Callable[..., None]]) -> None:
    first, second, third = steps_of(sampler_of(steps=3), fault())
    assert not first == second == third


# What capturing does.
@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Recording]:
    """Graphs on CPU tensors, by tapes; the recordings that were made."""
    return emulate(monkeypatch)


def assert_same(one: Chains, other: Chains) -> None:
    for name in ("eps", "potentials", "images"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.trace is None) == (other.trace is None)
    if one.trace is not None and other.trace is not None:
        assert one.trace.steps == other.trace.steps
        for name in ("potentials", "gradient_norms", "images"):
            assert torch.equal(getattr(one.trace, name), getattr(other.trace, name)), name


@pytest.mark.parametrize("potential", ["paper", "official"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_chain_has_the_eager_ones_bits_for_any_seeds_and_start(
    backend: Any, potential: Potential, emulated: list[graphs.Recording]
) -> None:
    options: dict[str, Any] = dict(potential=potential, step_size=[1e-3, 4e-3, 2e-3, 1e-3], temperature=0.8)
    captured = sampler_of(backend, **options)
    eager = vf.LangevinSampler(captured.model, steps=4, capture=False, **options)
    results = []
    for call, seeds in enumerate((range(3), range(3), range(5, 8), [2**63, 1, 2], range(3))):
        start = 2 * eager.start(seeds) if call == 3 else None
        results.append((captured.run(seeds, start=start, trace_every=2), eager.run(seeds, start=start, trace_every=2)))
        assert len(emulated) == min(call, 1), "the first call warms up, the second captures, the others replay"
    for result, expected in results:  # compared at the end: a replay leaves earlier results alone
        assert_same(result, expected)


def test_a_captured_chain_sees_weights_that_were_folded_anew(emulated: list[graphs.Recording]) -> None:
    model = small_model()
    captured, eager = (vf.LangevinSampler(model, steps=2, step_size=1e-2, capture=c) for c in (True, False))
    before = [captured.run(range(2)).eps for _ in range(3)][-1]
    with torch.no_grad():
        model.energy.linear.weight.mul_(-5)
        model.vae.prior_ftr0.mul_(2)
    after = captured.run(range(2))
    assert len(emulated) == 1 and not torch.equal(after.eps, before)
    assert_same(after, eager.run(range(2)))


def test_a_captured_chain_refuses_stale_weights_as_an_eager_one_does(emulated: list[graphs.Recording]) -> None:
    model = small_model()
    frozen = model.freeze()
    for sampler in (vf.LangevinSampler(frozen, steps=1, step_size=1e-3, capture=c) for c in (True, False)):
        for _ in range(3):
            sampler.run(range(2))
        with torch.no_grad():
            model.energy.linear.weight.mul_(2)
        with pytest.raises(StaleWeightsError, match=r"call refresh\(\)"):
            sampler.run(range(2))
        frozen.refresh()
        sampler.run(range(2))


def test_a_captured_chain_reports_chains_that_left_the_numbers(emulated: list[graphs.Recording]) -> None:
    sampler = sampler_of()
    eager = vf.LangevinSampler(sampler.model, steps=4, step_size=1e-3, capture=False)
    broken = sampler.start(range(3))
    broken[1, 0] = math.nan
    for start in (None, None, broken, None, broken):
        chains = sampler.run(range(3), start=start, nonfinite="redo")
        expected = eager.run(range(3), start=start, nonfinite="redo")
        assert chains.redone == chains.failed == expected.failed == ([] if start is None else [1])
        assert torch.equal(chains.eps[[0, 2]], expected.eps[[0, 2]])
    assert len(emulated) == 1, "few chains are redone, another number each time: eagerly"


def test_each_size_and_setting_has_a_graph_of_its_own_and_the_oldest_goes(emulated: list[graphs.Recording]) -> None:
    sampler = sampler_of(steps=1)
    eager = vf.LangevinSampler(sampler.model, steps=1, step_size=1e-3, capture=False)
    settings: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (3, {}),
        (2, {"stream": Stream.TRAIN_CHAIN}),
        (2, {"trace_every": 1}),
    ]
    for count in range(1, 4):
        for size, options in settings:
            assert_same(sampler.run(range(size), **options), eager.run(range(size), **options))
        assert len(emulated) == (0 if count == 1 else len(settings))
    for _ in range(2):
        sampler.run(range(4))
    assert len(emulated) == 5 and sampler._graphs is not None
    assert len(sampler._graphs._recordings) == graphs.MOST_GRAPHS == 4
    sampler.run(range(2), trace_every=1)
    assert len(emulated) == 5
    sampler.run(range(2))
    assert len(emulated) == 6


def test_a_graph_is_not_replayed_where_float32_is_multiplied_otherwise(emulated: list[graphs.Recording]) -> None:
    """What was captured would go on with the kernels of before."""
    call, cudnn = graphs.Graphs(), torch.backends.cudnn.allow_tf32
    try:
        for made, precision, allow_tf32 in ((1, "highest", True), (2, "high", True), (3, "highest", False)):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = allow_tf32
            for _ in range(3):
                call(lambda x: (x + 1,), (torch.ones(2),), "key")
            assert len(emulated) == made
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = cudnn


def test_a_chain_that_is_watched_or_must_not_be_captured_runs_eagerly(emulated: list[graphs.Recording]) -> None:
    steps: list[int] = []
    sampler = sampler_of()
    for _ in range(3):
        sampler.run(range(2), on_step=lambda k, eps: steps.append(k))
        sampler_of(capture=False).run(range(2))
    assert steps == [1, 2, 3, 4] * 3 and not emulated


def test_where_inference_mode_and_gradients_are_on_makes_no_difference(emulated: list[graphs.Recording]) -> None:
    sampler = sampler_of()
    expected = sampler.run(range(2)).eps
    with torch.inference_mode():
        assert torch.equal(sampler.run(range(2)).eps, expected)
    start = sampler.start(range(2)).requires_grad_()
    chains = sampler.run(range(2), start=start)
    assert torch.equal(chains.eps, expected) and not chains.eps.requires_grad
    with torch.inference_mode():
        assert torch.equal(sampler.run(range(2)).eps, expected)
    assert len(emulated) == 1 and not any(tensor.requires_grad for tensor in emulated[0].inputs)


class Asking:
    """A model that asks the device for a number; everything else is the frozen pair's."""

    def __init__(self) -> None:
        self._pair = small_model().freeze()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def potential_and_grad(self, *args: Any) -> tuple[Tensor, list[Tensor]]:
        u, gradients = self._pair.potential_and_grad(*args)
        return u * (1 if float(u.sum()) < math.inf else 2), gradients


def test_a_chain_that_cannot_be_captured_runs_eagerly_after_one_warning_that_says_why(
    emulated: list[graphs.Recording],
) -> None:
    captured, eager = (vf.LangevinSampler(Asking(), steps=2, step_size=1e-3, capture=c) for c in (True, False))
    eager.model = captured.model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = captured.run(range(2))
    sentence = r"^A chain could not be captured .* eagerly: aten\._local_scalar_dense\.default makes the host wait$"
    with pytest.warns(UserWarning, match=sentence) as caught:
        second = captured.run(range(2))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [captured.run(range(2)), captured.run(range(2)), captured.run(range(3))]
    for chains in (first, second, *others):
        assert_same(chains, eager.run(range(len(chains.eps))))


def test_the_reason_of_a_failed_capture_is_what_was_raised_first(
    emulated: list[graphs.Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_as_torch_does(function: graphs.Function, inputs: Sequence[Tensor], pool: Any) -> graphs.Recording:
        try:
            raise RuntimeError("the reason")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "_record", fail_as_torch_does)
    sampler = sampler_of(steps=1)
    expected = sampler.run(range(2))
    with pytest.warns(UserWarning, match="runs eagerly: the reason$"):
        assert_same(sampler.run(range(2)), expected)


def test_a_capture_for_which_memory_ran_out_leaves_nothing_behind_and_smaller_batches_are_captured(
    emulated: list[graphs.Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager chain that follows may need all the memory that there is, and a job then goes on with half a batch."""
    sampler = sampler_of(steps=1)
    run, made, alive = sampler._chains, [], []

    def chains(keys: Tensor, *args: Any, **options: Any) -> Any:
        alive.append([kept() is not None for kept in made])
        activations = torch.empty(1)
        made.append(weakref.ref(activations))
        outcome = run(keys, *args, **options)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")
        return outcome

    monkeypatch.setattr(sampler, "_chains", chains)
    expected = sampler.run(range(4))
    with pytest.warns(UserWarning, match="runs eagerly: CUDA out of memory.$"):
        assert_same(sampler.run(range(4)), expected)
    assert alive == [[], [False], [False, False]] and not emulated
    for _ in range(2):
        sampler.run(range(2))
    assert len(emulated) == 1


def test_all_graphs_share_one_pool(emulated: list[graphs.Recording]) -> None:
    sampler = sampler_of(steps=1)
    for size in (2, 3):
        for _ in range(2):
            sampler.run(range(size))
    assert emulated[0].pool is emulated[1].pool is not None


def test_on_a_cpu_nothing_is_captured_and_nothing_fails() -> None:
    sampler = sampler_of()
    assert sampler._graphs is not None
    for _ in range(3):
        sampler.run(range(2))
    assert not sampler._graphs._recordings and not sampler._graphs._warm


def test_a_tape_replays_what_it_recorded() -> None:
    """The emulation itself: functional, in-place, view and allocating operators, for inputs that changed."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        count = torch.zeros(())
        y = x.t() * 2
        y[0] += count.add_(1)
        return y, torch.stack([count, y.sum()])

    recording = record(function, (torch.randn(2, 3),))
    for _ in range(2):
        x = torch.randn(2, 3)
        for actual, expected in zip(recording((x,)), function(x), strict=True):
            assert torch.equal(actual, expected)
