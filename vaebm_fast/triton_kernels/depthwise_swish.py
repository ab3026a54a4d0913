"""depthwise_swish and its backward on NHWC memory: register tiles that step down the rows of an image.

All four forms are one sliding window, target[i, j] = sum_{m, n} w[m, n] source[S i + m + first, S j + n + first]:

                     source     S  TAPS         w[m]
    forward          swish(h)   1  K            weight[m]
    with upsample    swish(h)   1  (K + 1) / 2  taps of one output phase that fall on the same source pixel, summed
    backward         dy         1  K            weight[K - 1 - m]
    with upsample    dy         2  K + 1        taps of the two output pixels made from one source pixel, summed
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, swish, swish_slope


class Config(NamedTuple):
    """A program owns BLOCK_X strips of STRIP adjacent target pixels, by BLOCK_C channels.

    HOIST keeps the window in registers for all rows; without it every row reads it from the cache again.
    """

    STRIP: int
    BLOCK_X: int
    BLOCK_C: int
    HOIST: bool
    num_warps: int


# Key: largest K, upsample, backward, bytes per element.
CONFIGS: dict[tuple[int, bool, bool, int], Config] = {
    # tune_triton: begin CONFIGS
    # Timed on an NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0.
    (5, False, False, 4): Config(4, 4, 32, True, 4),  # not timed
    (5, False, True, 4): Config(4, 4, 32, True, 4),  # not timed
    (5, True, False, 4): Config(4, 4, 32, True, 4),  # not timed
    (5, True, True, 4): Config(2, 4, 32, True, 4),  # not timed
    (5, False, False, 2): Config(4, 1, 64, True, 2),
    (5, False, True, 2): Config(2, 4, 64, True, 4),
    (5, True, False, 2): Config(4, 4, 64, True, 4),
    (5, True, True, 2): Config(2, 4, 64, True, 4),
    (11, False, False, 4): Config(4, 4, 32, False, 4),  # not timed
    (11, False, True, 4): Config(4, 4, 32, False, 4),  # not timed
    (11, True, False, 4): Config(4, 4, 32, True, 4),  # not timed
    (11, True, True, 4): Config(2, 4, 32, False, 4),  # not timed
    (11, False, False, 2): Config(4, 4, 32, False, 4),  # not timed
    (11, False, True, 2): Config(4, 4, 32, False, 4),  # not timed
    (11, True, False, 2): Config(4, 4, 32, True, 4),  # not timed
    (11, True, True, 2): Config(2, 4, 32, False, 4),  # not timed
    # tune_triton: end CONFIGS
}
MAX_ROWS = 32  # target rows per program at most; adjacent programs both read the TAPS - 1 rows at their border


@triton.jit
def _read_tap(weight, is_channel, k, l, C: tl.constexpr, K: tl.constexpr, FOLD: tl.constexpr):  # noqa: E741
    """sum_{u, v < FOLD} weight[k + u, l + v], zero outside the window; float32 [1, BLOCK_C]."""
    tap = tl.zeros_like(is_channel).to(tl.float32)
    for u in tl.static_range(FOLD):
        for v in tl.static_range(FOLD):
            inside = is_channel & (k + u >= 0) & (k + u < K) & (l + v >= 0) & (l + v < K)
            tap += tl.load(weight + ((k + u) * K + l + v) * C, mask=inside, other=0.0).to(tl.float32)
    return tap


@triton.jit
def _read_row(
    source, row_start, row_exists, left, W, is_channel, C: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATE: tl.constexpr
):
    """COLUMNS pixels from `left` on, float32 [BLOCK_X, BLOCK_C] each; zero outside the image, since swish(0) = 0."""
    pixels = ()
    for x in tl.static_range(COLUMNS):
        column = left + x
        inside = row_exists & (column >= 0) & (column < W)
        pixel = tl.load(source + (row_start + column) * C, mask=inside & is_channel, other=0.0).to(tl.float32)
        pixels = pixels + (swish(pixel) if ACTIVATE else pixel,)
    return pixels


@triton.jit(do_not_specialize=["N"])  # otherwise recompiled for N = 1 and for multiples of 16
def depthwise_kernel(
    source, weight, bias, slope_of, target, activated, N, H, W, rows, columns,
    C: tl.constexpr, K: tl.constexpr, UPSAMPLE: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Grid: units of (image, chunk of rows, strip), blocks of channels, phases of the output.

    source [N, H, W, C] -> target [N, PHASES rows, PHASES columns, C]; slope_of and the optional activated =
    swish(target) have target's shape. A program steps down ROWS rows of one phase. Each source element is read
    (STRIP S + TAPS - S) / (STRIP S) times, from cache after the first; each target element is written once.
    """
    FOLD: tl.constexpr = 2 if UPSAMPLE else 1
    S: tl.constexpr = 2 if UPSAMPLE and BACKWARD else 1
    PHASES: tl.constexpr = 2 if UPSAMPLE and not BACKWARD else 1
    TAPS: tl.constexpr = (K + 1) // 2 if PHASES == 2 else K + FOLD - 1
    STEP: tl.constexpr = PHASES if not BACKWARD else -1
    COLUMNS: tl.constexpr = S * (STRIP - 1) + TAPS
    DEPTH: tl.constexpr = TAPS // S  # rows of the target that one row of the source reaches

    strips, chunks = tl.cdiv(columns, STRIP), tl.cdiv(rows, ROWS)
    unit = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)[:, None]  # [BLOCK_X, 1]
    n, top, left = unit // (strips * chunks), unit // strips % chunks * ROWS, unit % strips * STRIP
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    is_channel = channel < C
    p, q = tl.program_id(2) // 2, tl.program_id(2) % 2  # both zero without phases

    first_row, first_column = -(K // 2), -(K // 2)
    first_k, first_l = 0, 0
    if PHASES == 2:
        first_row, first_column = (p + K // 2) // 2 - K // 2, (q + K // 2) // 2 - K // 2  # floor((p - K // 2) / 2)
        first_k, first_l = 2 * first_row + K // 2 - p, 2 * first_column + K // 2 - q
    if BACKWARD:
        first_k, first_l = K - 1, K - 1
    window = ()
    for m in tl.static_range(TAPS if HOIST else 0):
        for tap in tl.static_range(TAPS):
            k, l = first_k + STEP * m, first_l + STEP * tap  # noqa: E741
            window = window + (_read_tap(weight + channel, is_channel, k, l, C, K, FOLD),)

    zero = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    start = zero
    if not BACKWARD:
        start += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    unfinished = ()  # partial sums of rows still being accumulated, newest first: (DEPTH - 1) STRIP
    for _ in tl.static_range((DEPTH - 1) * STRIP):
        unfinished = unfinished + (zero,)
    for t in range(ROWS + DEPTH - 1):
        pixels = ()
        for s in tl.static_range(S):
            row = S * (top + t) + s + first_row
            exists = (n < N) & (row >= 0) & (row < H)
            pixels = pixels + _read_row(
                source + channel, (n * H + row) * W, exists, S * left + first_column, W, is_channel, C,
                COLUMNS, not BACKWARD,
            )  # fmt: skip
        younger = ()
        for depth in tl.static_range(DEPTH):
            totals = ()
            for j in tl.static_range(STRIP):
                totals = totals + (unfinished[(depth - 1) * STRIP + j] if depth > 0 else start,)
            for s in tl.static_range(S):
                for tap in tl.static_range(TAPS):
                    if HOIST:
                        w = window[(S * depth + s) * TAPS + tap]
                    else:  # load right before use: Triton keeps load order, so loading earlier fills the registers
                        k, l = first_k + STEP * (S * depth + s), first_l + STEP * tap  # noqa: E741
                        w = _read_tap(weight + channel, is_channel, k, l, C, K, FOLD)
                    sums = ()
                    for j in tl.static_range(STRIP):
                        sums = sums + (totals[j] + w * pixels[s * COLUMNS + S * j + tap],)
                    totals = sums
            if depth < DEPTH - 1:
                younger = younger + totals
        unfinished = younger
        i = top + t - (DEPTH - 1)
        for j in tl.static_range(STRIP):
            inside = (n < N) & (i >= top) & (i < rows) & (left + j < columns) & is_channel
            target_row = (n * PHASES * rows + PHASES * i + p) * PHASES * columns
            offset = (target_row + PHASES * (left + j) + q) * C + channel
            y = totals[j]
            if BACKWARD:
                y *= swish_slope(tl.load(slope_of + offset, mask=inside, other=0.0).to(tl.float32))
            tl.store(target + offset, y.to(target.dtype.element_ty), mask=inside)
            if activated is not None:
                stored = y.to(target.dtype.element_ty).to(tl.float32)  # same bits as activating the stored target
                tl.store(activated + offset, swish(stored).to(target.dtype.element_ty), mask=inside)


def _config(K: int, upsample: bool, backward: bool, itemsize: int) -> Config:
    widest = max(known for known, *_ in CONFIGS)
    key = 5 if K <= 5 else widest
    return CONFIGS[key, upsample, backward, itemsize]


def _launch(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope_of: Tensor | None,
    target: Tensor,
    upsample: bool,
    activated: Tensor | None = None,
) -> None:
    """One launch over all images; tensors [N, C, H, W] with NHWC memory."""
    if target.numel() == 0:
        return
    N, C, H, W = source.shape
    K, backward = weight.shape[0], slope_of is not None
    phases = 2 if upsample and not backward else 1
    rows, columns = target.shape[2] // phases, target.shape[3] // phases
    config = _config(K, upsample, backward, source.element_size())
    chunk = triton.cdiv(rows, triton.cdiv(rows, MAX_ROWS))
    units = N * triton.cdiv(rows, chunk) * triton.cdiv(columns, config.STRIP)
    grid = (triton.cdiv(units, config.BLOCK_X), triton.cdiv(C, config.BLOCK_C), phases * phases)
    depthwise_kernel[grid](
        source, weight, bias, slope_of, target, activated, N, H, W, rows, columns,
        C=C, K=K, UPSAMPLE=upsample, BACKWARD=backward, ROWS=chunk, **config._asdict(),
    )  # fmt: skip


def depthwise_swish(h: Tensor, weight: Tensor, bias: Tensor, upsample: bool) -> Tensor:
    """y of `vaebm_fast.ops.depthwise_swish.depthwise_swish`, channels_last."""
    return depthwise_activated(h, weight, bias, upsample, False)[0]


def depthwise_activated(
    h: Tensor, weight: Tensor, bias: Tensor, upsample: bool, with_activated: bool
) -> tuple[Tensor, Tensor | None]:
    """y of `depthwise_swish` and, with `with_activated`, swish(y), from one launch."""
    N, C, H, W = h.shape
    scale = 2 if upsample else 1
    y = torch.empty((N, C, scale * H, scale * W), dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    activated = torch.empty_like(y, memory_format=torch.channels_last) if with_activated else None
    _launch(nhwc(h), weight.contiguous(), bias.contiguous(), None, y, upsample, activated)
    return y, activated


def depthwise_swish_backward(dy: Tensor, h: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    """dh of `vaebm_fast.ops.depthwise_swish.depthwise_swish_backward`, channels_last."""
    dh = torch.empty_like(h, memory_format=torch.channels_last)
    _launch(nhwc(dy), weight.contiguous(), None, nhwc(h), dh, upsample)
    return dh
