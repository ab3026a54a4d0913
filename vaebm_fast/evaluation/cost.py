"""Cost of one chain step per image: FLOPs, memory traffic, and lower bounds on GPU time.

A step is `potential_and_grad` of the official potential: forward, and backward to the noise. Counts come from running
the step on the meta device, which propagates shapes only, or from the shapes of the decoder's cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vaebm_fast.chain.langevin import ChainModel
from vaebm_fast.config import find_preset
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.frozen.cells import FUSED_SIDE, freeze_cell
from vaebm_fast.frozen.part import tensors_of
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import Cell, InvertedResidual
from vaebm_fast.ops._backend import Backend, OpBackends, why_absent

META = torch.device("meta")
BF16_BYTES = 2

# Operators that move no data but are not marked as views.
UNMOVED = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like}
# Indices of arguments that an operator does not read: used only for their shape, an unrequested gradient, or backward.
UNREAD = {
    "aten::convolution_backward": (1,),
    "aten::avg_pool2d_backward": (1,),
    "vaebm_fast::pointwise": (2,),
    "vaebm_triton::pointwise": (2,),
    "vaebm_fast::inverted_residual": (2,),
}
# Tensors whose bytes a multi-kernel op moves once more internally, from (arguments, results): data that one kernel
# writes and another reads. Not counted: swish(h2), which few cells store in addition to h2.
INSIDE: dict[str, Callable[[Any, Any], tuple[Tensor, ...]]] = {
    "vaebm_triton::residual_tail": lambda args, results: results[1:3],  # h2 and s, read again
    "vaebm_triton::residual_tail_backward": lambda args, results: (args[0], args[2], args[2]),  # dy; dh2 both ways
}
# Pairs with compiled kernels; the ops' fake implementations run on the meta device, so counting needs no GPU.
COMPILED: dict[str, tuple[Backend, torch.dtype]] = {
    "frozen, cpp, float32": ("cpp", torch.float32),
    "frozen, triton, bfloat16": ("triton", torch.bfloat16),
    "frozen, cuda, bfloat16": ("cuda", torch.bfloat16),
}


@dataclass(frozen=True)
class Peaks:
    """A GPU's stated peak rates: dense bfloat16 tensor cores and float32 CUDA cores [TFLOP/s], memory [TB/s]."""

    tensor_tflops: float
    fp32_tflops: float
    memory_tbps: float


GPUS = {"A100": Peaks(312, 19.5, 2.039), "H200": Peaks(989, 67, 4.8)}  # NVIDIA's data sheets: A100 80 GB SXM, H200 SXM


@dataclass(frozen=True)
class Traffic:
    """Bytes moved by a step: per image, and once per batch (the weights); and how many operators move them."""

    per_image: float
    per_step: float
    operators: int = 0  # dispatched per step, whatever the batch; views and allocations are not counted


@dataclass(frozen=True)
class CellShape:
    """An inverted residual of the decoder: x [in_channels] -> hidden -> y [out_channels] at `side` x `side` pixels.

    In an upsampled cell, x and the expanded tensor h1 have half the side; h2 is the depthwise convolution's output.
    """

    in_channels: int
    hidden: int
    out_channels: int
    side: int
    window: int
    is_upsampled: bool
    weights: int

    @property
    def x(self) -> int:
        """Elements of the input."""
        return self.in_channels * self._source_pixels

    @property
    def y(self) -> int:
        """Elements of the output, and of the branch s before the gate."""
        return self.out_channels * self.side**2

    @property
    def h1(self) -> int:
        """Elements of the expanded tensor."""
        return self.hidden * self._source_pixels

    @property
    def h2(self) -> int:
        """Elements of the depthwise output, called "hidden elements" below."""
        return self.hidden * self.side**2

    @property
    def depthwise_flops(self) -> int:
        """Forward plus backward FLOPs; in upsampled cells, taps that read the same source pixel are presummed."""
        taps = (self.window + 1) // 2 if self.is_upsampled else self.window
        return 2 * 2 * taps**2 * self.h2

    @property
    def _source_pixels(self) -> int:
        return (self.side // 2 if self.is_upsampled else self.side) ** 2


# Elements moved by a fused inverted residual, forward and backward, without weights. All plans move 4 x and 5 y: the
# block reads x and writes s; the gate reads s and x and writes y; in backward, the gate's sum reads s, and the block
# reads x and dy and writes dx. Two kernels each way save one read of x by storing h1, which is written once, read by
# the depthwise, and read twice in backward; the gradient between the two kernels is written and read.
PLANS: dict[str, Callable[[CellShape], int]] = {
    "two kernels each way": lambda c: 3 * c.x + 5 * c.y + 4 * c.h1 + 2 * c.h2,
    "one kernel, depthwise output saved": lambda c: 4 * c.x + 5 * c.y + 2 * c.h2,
    "one kernel, all recomputed": lambda c: 4 * c.x + 5 * c.y,
}


@dataclass(frozen=True)
class Cost:
    """Result of `cost`. FLOPs are per image; `traffic` is of the current kernels, `plans` of PLANS in bfloat16."""

    preset: str
    noise_dim: int
    plain_flops: int
    frozen_flops: int
    traffic: dict[str, Traffic]
    plans: dict[str, Traffic]
    rest_bytes: float  # per image, same in all plans: unfused operators, as dispatched in bfloat16
    cells: tuple[CellShape, ...]
    weights: int  # elements read by a frozen step

    @property
    def depthwise_flops(self) -> int:
        """Part of `frozen_flops` that cannot run on tensor cores."""
        return sum(cell.depthwise_flops for cell in self.cells)

    def floors_ms(self, gpu: str) -> dict[str, float]:
        """Lower bound on milliseconds per image for each GPU resource at its stated peak; excludes weights."""
        peaks = GPUS[gpu]
        floors = {
            "tensor cores, all except depthwise": (self.frozen_flops - self.depthwise_flops) / peaks.tensor_tflops,
            "CUDA cores in float32, depthwise": self.depthwise_flops / peaks.fp32_tflops,
        }
        floors |= {f"memory, {name}": plan.per_image / peaks.memory_tbps for name, plan in self.plans.items()}
        return {name: floor * 1e-9 for name, floor in floors.items()}


def cost(preset: str) -> Cost:
    """Count a preset's step for all available backends. Raises ValueError for an unknown preset."""
    model = _without_values(preset)
    reference, halved = (freeze(model, dtype, "reference") for dtype in (torch.float32, torch.bfloat16))
    traffic = {
        "plain modules, float32": step_traffic(model),
        "frozen, reference, float32": step_traffic(reference),
        "frozen, reference, bfloat16": step_traffic(halved),
    }
    if why_absent("cpp") is None:
        traffic |= {name: step_traffic(freeze(model, dtype, backend)) for name, (backend, dtype) in COMPILED.items()}
    shapes, dispatched = _decoder_cells(model)
    weights = _weights_of(halved)
    rest = traffic["frozen, reference, bfloat16"].per_image - dispatched
    plans = _plans(shapes, rest, weights)
    dim = model.noise_layout.dim
    return Cost(preset, dim, step_flops(model), step_flops(reference), traffic, plans, rest, tuple(shapes), weights)


def text(counted: Cost) -> str:
    """Human-readable report of the cost."""
    cells, wide = counted.cells, [cell for cell in counted.cells if cell.side >= FUSED_SIDE]
    hidden, hidden_wide = sum(cell.h2 for cell in cells), sum(cell.h2 for cell in wide)
    lines = [
        f"{counted.preset}: one chain step, counted (official potential, forward and backward to the noise)",
        "",
        f"noise                {counted.noise_dim:,} elements per image",
        f"frozen weights       {counted.weights / 1e6:.1f} M, including {sum(c.weights for c in cells) / 1e6:.1f} M in "
        f"{len(cells)} inverted residuals of the decoder",
        f"hidden elements      {hidden / 1e6:.1f} M per image in these, {hidden_wide / 1e6:.1f} M in the "
        f"{len(wide)} with H >= {FUSED_SIDE}, which have {sum(c.weights for c in wide) / 1e6:.1f} M weights",
        f"GFLOP per image      {counted.plain_flops / 1e9:.1f} plain, {counted.frozen_flops / 1e9:.1f} frozen, "
        f"including {counted.depthwise_flops / 1e9:.1f} depthwise",
        "",
        f"{'memory traffic, no cache':52}  GB per image        in cells  GB of weights per step  operators",
    ]
    rest = counted.rest_bytes / 1e9
    for name, moved in counted.traffic.items():
        lines.append(f"{name:52}{moved.per_image / 1e9:14.3f}{'':16}{moved.per_step / 1e9:24.3f}{moved.operators:11}")
    for name, moved in counted.plans.items():
        image = moved.per_image / 1e9
        lines.append(f"{f'plan: {name}, bfloat16':52}{image:14.3f}{image - rest:16.3f}{moved.per_step / 1e9:24.3f}")
    missing = why_absent("cpp")
    if missing is not None:
        lines.append(f"{'; '.join(COMPILED)}: not counted, because {missing}")
    lines += ["", f"{'lower bound, ms per image at stated peak rates':52}" + "".join(f"{gpu:>10}" for gpu in GPUS)]
    floors = {gpu: counted.floors_ms(gpu) for gpu in GPUS}
    lines += [f"{name:52}" + "".join(f"{floors[gpu][name]:10.3f}" for gpu in GPUS) for name in floors["A100"]]
    return "\n".join(lines)


def pair_flops(preset: str) -> tuple[int, int]:
    """FLOPs per image of a preset's step, plain and frozen. Raises ValueError for an unknown preset."""
    model = _without_values(preset)
    return step_flops(model), step_flops(freeze(model, backend="reference"))


def least_traffic(preset: str) -> Traffic:
    """Bytes of a preset's step in bfloat16 with the cheapest of PLANS. Raises ValueError for an unknown preset."""
    model = _without_values(preset)
    halved = freeze(model, torch.bfloat16, "reference")
    shapes, dispatched = _decoder_cells(model)
    plans = _plans(shapes, step_traffic(halved).per_image - dispatched, _weights_of(halved))
    return min(plans.values(), key=lambda plan: plan.per_image)


def _plans(shapes: list[CellShape], rest: float, weights: int) -> dict[str, Traffic]:
    """Traffic of each plan in bfloat16; `rest`: bytes per image outside the cells."""
    return {
        name: Traffic(rest + BF16_BYTES * sum(map(moved, shapes)), 2 * BF16_BYTES * weights)  # both passes read them
        for name, moved in PLANS.items()
    }


def _weights_of(pair: FrozenVAEBM) -> int:
    return sum(tensor.numel() for part in pair._parts for tensor in tensors_of(part.weights))


def step_flops(pair: ChainModel) -> int:
    """FLOPs per image of a step from torch's counter: convolutions and matrix products, 2 per multiply-add.

    `pair` is on the meta device. The counter ignores compiled ops; count the reference pair, which is equivalent.
    """
    with FlopCounterMode(display=False) as counter:
        _step(pair, 1)
    return int(counter.get_total_flops())


def step_traffic(pair: ChainModel) -> Traffic:
    """Bytes read and written by the kernels of a step, assuming no cache; `pair` is on the meta device."""
    one, two = (_moved(partial(_step, pair, batch)) for batch in (1, 2))
    return Traffic(two.bytes - one.bytes, 2 * one.bytes - two.bytes, one.operators)


def _without_values(preset: str) -> VAEBM:
    """The preset's networks on the meta device."""
    found = find_preset(preset)
    with META:
        model = VAEBM(NVAE(found.nvae), EnergyNetwork(found.energy))
    return model.eval().requires_grad_(False)


def _step(pair: ChainModel, batch: int) -> None:
    layout = pair.noise_layout
    pair.potential_and_grad(*layout.split(torch.empty(batch, layout.dim, device=META)), "official", 1.0)


def bytes_moved(run: Callable[[], object]) -> int:
    """Bytes that the operators of a call read and write, assuming no cache; tensors are on the meta device."""
    return _moved(run).bytes


def _moved(run: Callable[[], object]) -> _Operators:
    with _Operators() as counter:
        run()
    return counter


class _Operators(TorchDispatchMode):
    """Counts operators on tensors, without views and allocations, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in UNMOVED:
            read = [arg for index, arg in enumerate(args) if index not in UNREAD.get(func.name(), ())]
            inside = INSIDE[func.name()](args, result) if func.name() in INSIDE else ()
            self.bytes += sum(map(_distinct_bytes, tree_leaves((read, kwargs, result, inside))))
            self.operators += any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, result)))
        return result


def _distinct_bytes(value: object) -> int:
    """Bytes of a tensor's storage, expanded dimensions counted once; 0 for other values."""
    if not isinstance(value, Tensor):
        return 0
    sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * value.element_size()


def _decoder_cells(model: VAEBM) -> tuple[list[CellShape], int]:
    """The decoder's inverted residuals, and the bytes per image that they currently move in bfloat16."""
    shapes: list[CellShape] = []
    moved = 0

    def record(cell: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        assert isinstance(cell, Cell)
        if isinstance(cell._ops[0], InvertedResidual):
            shapes.append(_cell_shape(cell, inputs[0], output))
            moved += _cell_bytes(cell, inputs[0].shape, 2) - _cell_bytes(cell, inputs[0].shape, 1)

    cells = [m for part in (model.vae.dec_tower, model.vae.post_process) for m in part if isinstance(m, Cell)]
    hooks = [cell.register_forward_hook(record) for cell in cells]
    try:
        model.vae.decode([torch.empty(1, *shape, device=META) for shape in model.latent_shapes])
    finally:
        for hook in hooks:
            hook.remove()
    return shapes, moved


def _cell_shape(cell: Cell, x: Tensor, y: Tensor) -> CellShape:
    op = cell._ops[0]
    assert isinstance(op, InvertedResidual)
    _, depthwise, project = (m for m in op.modules() if isinstance(m, nn.Conv2d))
    weights = sum(parameter.numel() for parameter in cell.parameters())
    return CellShape(
        in_channels=x.shape[1],
        hidden=project.in_channels,
        out_channels=y.shape[1],
        side=y.shape[2],
        window=depthwise.kernel_size[0],
        is_upsampled=y.shape[2] > x.shape[2],
        weights=weights,
    )


def _cell_bytes(cell: Cell, shape: torch.Size, batch: int) -> int:
    """Bytes moved by a frozen cell's forward and backward pass, including weights."""
    frozen = freeze_cell("cell", cell, torch.bfloat16, OpBackends.of("reference"))
    x = torch.empty(batch, *shape[1:], dtype=torch.bfloat16, device=META).to(memory_format=torch.channels_last)

    def run() -> None:
        leaf = x.detach().requires_grad_()
        y = frozen(leaf)
        torch.autograd.grad(y, leaf, torch.empty_like(y))

    return bytes_moved(run)
