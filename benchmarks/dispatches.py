"""How many operators does a chain step dispatch? Small operators are host-bound.

Counted on the meta device: what reads or writes memory; views and allocations do not. A step is U, its gradient
(official potential) and the update of all noise. One image; a batch dispatches the same. The baseline is the plain
modules. On a CUDA device most operators are one kernel; a captured chain (`chain.graphs`) is one launch in all.

    python -m benchmarks.dispatches      prints the table, and writes it into docs/performance.md between its marks
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaebm_fast.chain.langevin import ChainModel, LangevinSampler, langevin_chain
from vaebm_fast.evaluation.cost import UNMOVED
from vaebm_fast.frozen import freeze
from vaebm_fast.models import VAEBM
from vaebm_fast.ops.langevin_update import langevin_update

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- dispatches: begin, written by python -m benchmarks.dispatches -->", "<!-- dispatches: end -->"
PRESETS = ("celeba_64", "cifar10", "celeba_256")
META = torch.device("meta")
# How a step runs: the pair's backend (none: the plain modules), its precision, the backend of the update.
FORMS: dict[str, tuple[Any, torch.dtype, Any]] = {
    "plain modules": (None, torch.float32, "reference"),
    "frozen, reference": ("reference", torch.float32, "reference"),
    "frozen, cpp": ("cpp", torch.float32, "cpp"),
    "frozen, triton, bfloat16": ("triton", torch.bfloat16, "cpp"),  # the update is one operator on cuda too
}


class DispatchCount(TorchDispatchMode):
    """Counts operators on tensors, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        has_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, result)))
        self.total += has_tensors and not func.is_view and func.overloadpacket not in UNMOVED
        return result


def step_dispatches(model: ChainModel, update_backend: Any) -> int:
    """Operators that one more step of a chain dispatches; a model on the meta device."""
    one, two = (_chain_dispatches(model, update_backend, steps) for steps in (1, 2))
    return two - one


def _chain_dispatches(model: ChainModel, update_backend: Any, steps: int) -> int:
    sampler = LangevinSampler(model, steps=steps, step_size=1e-3)
    keys, start = torch.empty(1, dtype=torch.int64, device=META), torch.empty(1, sampler.noise_layout.dim, device=META)
    update = partial(langevin_update, seeds=keys, stream=0, backend=update_backend)
    with DispatchCount() as count:
        langevin_chain(sampler._potential_and_grad, start, update, step_sizes=sampler.step_sizes)
    return count.total


def form_of(preset: str, form: str) -> ChainModel:
    """The preset on the meta device in one of FORMS. Raises RuntimeError where its backend is missing."""
    backend, dtype, _ = FORMS[form]
    with META:
        model = VAEBM.from_preset(preset).requires_grad_(False)
    if backend is not None:
        return freeze(model, dtype, backend)
    modules = {name: getattr(model, name) for name in ("device", "noise_layout", "potential_and_grad", "mean_image")}
    return cast(ChainModel, SimpleNamespace(**modules))  # without `freeze`, which a sampler would call


def table() -> str:
    """Operators per step, a row for every form and a column for every preset."""
    lines = [f"| operators per step | {' | '.join(PRESETS)} |", f"|---{'|---' * len(PRESETS)}|"]
    for form, (_, _, update_backend) in FORMS.items():
        counts = (step_dispatches(form_of(preset, form), update_backend) for preset in PRESETS)
        lines.append(f"| {form} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def written() -> str:
    """The table in the form of docs/performance.md."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    counted = table()
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{counted}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(counted)


if __name__ == "__main__":
    main()
