"""swish(x) = x sigmoid(x) and its slope, for float32 blocks inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swish(x):
    return x * tl.sigmoid(x)


@triton.jit
def swish_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))
