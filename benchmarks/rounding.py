"""How products round: TF32 on a machine without tensor cores, and whether its bfloat16 sums are float32.

TF32 has float32's exponent and 10 bits behind the point, for the operands of a product; sums stay in float32. How an
operand loses its last 13 bits is the kernel's choice: CUTLASS rounds to the nearest, halves away from zero, as PTX's
cvt.rna does, and so do the Triton kernels here; a kernel that gives its float32 registers to the tensor cores as they
are, as Triton's tl.dot does, has them cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

DROPPED_BITS = 13
aten = torch.ops.aten

# Where the operands of a product are among its arguments; bias, strides and the like are not operands.
OPERANDS: Mapping[Any, tuple[int, ...]] = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.convolution: (0, 1),
    aten.convolution_backward: (0, 1, 2),
}


def round_to_tf32(x: Tensor, *, truncate: bool = False) -> Tensor:
    """float32 `x` with its mantissa rounded to 10 bits, halves away from zero, or cut off; NaN and infinity stay."""
    bits = x.view(torch.int32)
    if not truncate:
        bits = bits + (1 << (DROPPED_BITS - 1))  # sign and magnitude: both signs grow in magnitude
    return torch.where(torch.isfinite(x), (bits & -(1 << DROPPED_BITS)).view(torch.float32), x)


class TF32Products(TorchDispatchMode):
    """Inside, matrix products and convolutions, forward and backward, read float32 operands rounded to TF32.

    Depthwise convolutions are left alone: tensor cores are no use to them, and CUDA cores multiply in float32.
    `rounded` and `left` count the calls by name. Raises RuntimeError for a product that torch's FLOP counter
    knows and the table does not.
    """

    def __init__(self, *, truncate: bool = False) -> None:
        super().__init__()
        self.truncate = truncate
        self.rounded: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        packet: Callable[..., Any] = func.overloadpacket
        if packet in OPERANDS and args[OPERANDS[packet][0]].dtype == torch.float32:
            is_depthwise = packet in (aten.convolution, aten.convolution_backward) and _groups(func, args) > 1
            (self.left if is_depthwise else self.rounded)[str(packet)] += 1
            if not is_depthwise:
                args = tuple(
                    round_to_tf32(value, truncate=self.truncate) if index in OPERANDS[packet] else value
                    for index, value in enumerate(args)
                )
        elif packet in flop_registry and packet not in OPERANDS:
            raise RuntimeError(f"{packet} multiplies, and its operands are not in benchmarks/rounding.py; add them.")
        return func(*args, **(kwargs or {}))


def _groups(func: Any, args: tuple[Any, ...]) -> int:
    """The argument `groups` of a convolution or its backward pass."""
    names = [argument.name for argument in func._schema.arguments]
    groups = args[names.index("groups")]
    assert isinstance(groups, int)
    return groups


PRODUCTS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "1x1 convolution": (F.conv2d, (2, 24, 6, 6), (8, 24, 1, 1)),
    "3x3 convolution": (lambda x, w: F.conv2d(x, w, padding=1), (2, 8, 6, 6), (8, 8, 3, 3)),
    "4x4 convolution": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (2, 8, 6, 6), (8, 8, 4, 4)),
    "transposed convolution": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), (2, 8, 6, 6), (8, 8, 4, 4)),
    "depthwise convolution": (lambda x, w: F.conv2d(x, w, padding=2, groups=16), (2, 16, 6, 6), (16, 1, 5, 5)),
    "linear layer": (F.linear, (3, 300), (5, 300)),
}


def require_float32_sums() -> None:
    """Raise RuntimeError where bfloat16 products round more than once here: bf16 would look worse than it is.

    Every result, and every gradient, must be within half a unit in the last place of the exact one.
    """
    generator = torch.Generator().manual_seed(0)
    for name, (function, *shapes) in PRODUCTS.items():
        operands = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        exact = forward_and_gradient(function, *(operand.double() for operand in operands))
        terms = forward_and_gradient(function, *(operand.double().abs() for operand in operands))
        for found, truth, size in zip(forward_and_gradient(function, *operands), exact, terms, strict=True):
            allowed = 2.0**-8 * truth.abs() + 2.0**-18 * size  # the second for float32's own roundings
            if not bool(((found.double() - truth).abs() <= allowed).all()):
                raise RuntimeError(
                    f"A {name} in bfloat16 rounds more than its result here (torch {torch.__version__}, "
                    f"{torch.backends.cpu.get_cpu_capability()}); run this on a CPU for which oneDNN has bfloat16."
                )


def forward_and_gradient(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and its gradient for `x` with ones and zeros as cotangent; images in NHWC, as in the frozen pair."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    x = x.clone(memory_format=layout).requires_grad_()
    y = function(x, *others)
    cotangent = (torch.arange(y.numel()) % 3 != 0).to(y.dtype).reshape(y.shape)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]
