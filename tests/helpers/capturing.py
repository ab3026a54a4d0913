"""CUDA graphs without CUDA: a tape of dispatched operators, which replays them, and refuses what a capture refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import vaebm_fast as vf
from vaebm_fast.chain import graphs
from vaebm_fast.chain.graphs import Function, Recording
from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks

CONFIG = NVAEConfig(
    image_size=8, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=2, num_channels_enc=8,
    num_channels_dec=8, num_preprocess_cells=1, num_postprocess_cells=1, num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)  # fmt: skip
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operators whose host needs the values


def small_model(channels: int = 8) -> vf.VAEBM:
    """A pair with everything that a real one has, 8x8 pixels, and an energy whose gradient is not lost."""
    config = replace(CONFIG, num_channels_dec=channels)
    model = vf.VAEBM(vf.NVAE(config).eval(), vf.EnergyNetwork(EnergyConfig(8, 3, 4, parse_blocks("1-1d 1-2 2-2"))))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        model.energy.linear.weight.mul_(20)
    return model


@dataclass(frozen=True)
class Entry:
    """A dispatched operator with the memory of its arguments and results, which is thus not used again.

    A tensor that is later put elsewhere (`set_`) is not followed, as it is not by a graph.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Tape(TorchDispatchMode):
    """Records every operator; as in a capture, what makes the host wait raises RuntimeError."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # lift_fresh: torch.tensor(1.0, device=...), a copy that the host waits for
        if WAITS & set(func.tags) or func.overloadpacket is torch.ops.aten.lift_fresh:
            raise RuntimeError(f"{func} makes the host wait\nand more lines of an explanation")
        result = func(*args, **(kwargs or {}))
        args, kwargs, kept = tree_map_only(Tensor, torch.detach, (args, kwargs or {}, result))
        self.entries.append(Entry(func, args, kwargs, kept))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again on the same tensors, each result into the memory that it had."""
        for entry in self.entries:
            results = tree_leaves(entry.op(*entry.args, **entry.kwargs))
            for kept, fresh in zip(tree_leaves(entry.result), results, strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != fresh.data_ptr():
                    kept.copy_(fresh)


@torch.inference_mode(False)
def record(function: Function, inputs: Sequence[Tensor], pool: Any = None) -> Recording:
    """`graphs._record`, on a tape; what a pool would hold is kept by the tape."""
    kept = tuple(given.detach().clone() for given in inputs)
    with Tape() as tape:
        outputs = function(*kept)
    return Recording(kept, outputs, tape.replay, pool or object())


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Have `graphs` capture functions of CPU tensors, by tapes; the recordings that it makes from now on."""
    made: list[Recording] = []

    def recording(function: Function, inputs: Sequence[Tensor], pool: Any) -> Recording:
        made.append(record(function, inputs, pool))
        return made[-1]

    monkeypatch.setattr(graphs, "_is_capturable", lambda tensor: True)
    monkeypatch.setattr(graphs, "_warm_up", lambda function, inputs: function(*inputs))
    monkeypatch.setattr(graphs, "_record", recording)
    return made


def launches(entries: Sequence[Entry]) -> list[Any]:
    """What a capture of these entries would hold: operators, scalars, shapes, strides, types, and which memory.

    Memory that an operator of `entries` made is known by its number among such, any other by its address.
    """
    names: dict[int, str] = {}

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage().data_ptr()
        where = names.get(storage, storage)
        return where, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device

    described = []
    for entry in entries:
        arguments = tree_map(describe, (entry.args, entry.kwargs))
        taken = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((entry.args, entry.kwargs)) if _is(leaf)}
        for leaf in filter(_is, tree_leaves(entry.result)):
            storage = leaf.untyped_storage().data_ptr()
            if storage not in taken:
                names[storage] = f"made by {len(described)}"
        described.append((entry.op, arguments, tree_map(describe, entry.result)))
    return described


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
