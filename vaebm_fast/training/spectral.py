"""Spectral regulariser: sum of the largest singular values of all convolutions, by batched power iteration.

Convolutions with equal weight shapes are stacked and iterated together; singular vectors persist between steps.
Source: NVAE (arXiv:2007.03898), section 3.2, equation 5; power iteration as in arXiv:1802.05957.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.config import whole_number
from vaebm_fast.models.layers import effective_weight
from vaebm_fast.ops.power_iteration import power_iteration

NORMALIZE_EPS = 1e-3


class SpectralRegulariser:
    """Sum of u'Wv over all convolutions of a module, W the effective weight as [Cout, rest]; gradient through W only.

    The first call runs `first_iterations` power iterations, later calls `iterations`. Initial singular vectors come
    from a generator seeded with `seed`.
    """

    def __init__(self, module: nn.Module, *, seed: int = 0, iterations: int = 4, first_iterations: int = 40) -> None:
        self.iterations, self.first_iterations = iterations, first_iterations
        self._seed = whole_number("seed", seed)
        self._convs = {name: conv for name, conv in module.named_modules() if isinstance(conv, nn.Conv2d)}
        self._names_by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, conv in self._convs.items():
            self._names_by_shape[(conv.out_channels, conv.weight[0].numel())].append(name)
        self._u: dict[tuple[int, int], Tensor] = {}
        self._v: dict[tuple[int, int], Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        """Reset the singular vectors to their initial values."""
        self.started = False
        generator = torch.Generator().manual_seed(self._seed)
        for shape, names in self._names_by_shape.items():
            device = self._convs[names[0]].weight.device
            for vectors, size in ((self._u, shape[0]), (self._v, shape[1])):
                start = torch.randn(len(names), size, generator=generator, dtype=torch.float32, device="cpu").to(device)
                vectors[shape] = F.normalize(start, dim=1, eps=NORMALIZE_EPS)

    def __call__(self) -> Tensor:
        """The regulariser's value, a scalar."""
        iterations = self.iterations if self.started else self.first_iterations
        self.started = True
        total = []
        for shape, names in self._names_by_shape.items():
            weight = torch.stack([effective_weight(self._convs[name]).flatten(1) for name in names])
            with torch.no_grad():
                u, v = self._u[shape], self._v[shape]
                u, v = power_iteration(weight, u, v, iterations=iterations, eps=NORMALIZE_EPS)
                self._u[shape], self._v[shape] = u, v
            total.append((u * torch.bmm(weight, v[:, :, None])[:, :, 0]).sum())
        return torch.stack(total).sum()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{"u": {convolution: [Cout]}, "v": {convolution: [rest]}}; empty before the first call."""
        vectors = {"u": self._u, "v": self._v}
        if not self.started:
            return {}
        return {
            side: {
                name: table[shape][i] for shape, names in self._names_by_shape.items() for i, name in enumerate(names)
            }
            for side, table in vectors.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `state_dict()`'s vectors; an empty state resets them."""
        if not state:
            return self._restart()
        self.started = True
        for shape, names in self._names_by_shape.items():
            self._u[shape] = torch.stack([state["u"][name] for name in names]).to(self._u[shape])
            self._v[shape] = torch.stack([state["v"][name] for name in names]).to(self._v[shape])
