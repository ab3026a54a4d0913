"""Counter-based noise written a second time, in numpy and from its definition alone: the truth for every backend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

LN2_HI, LN2_LO = np.float32(0.693359375), np.float32(-2.12194440e-4)
STEP = np.float32(1.46291808e-9)  # radians in 2^-32 of a turn
LOG = np.array(
    [0.333333313, -0.250008196, 0.200012416, -0.166234091, 0.142015815, -0.131596133, 0.127622008, -0.0763640329],
    dtype=np.float32,
)
SIN = np.array([-0.166666552, 8.33218917e-3, -1.95182904e-4], dtype=np.float32)
COS = np.array([-0.5, 4.16666456e-2, -1.38873095e-3, 2.44323273e-5], dtype=np.float32)


def philox4x32_10(counter: NDArray[np.uint64], key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32 on counters [..., 4]; numpy's uint64 products are exact."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    low = np.uint64(0xFFFFFFFF)
    for turn in range(10):
        k0, k1 = (np.uint64((k + turn * w) % 2**32) for k, w in zip(key, WEYL, strict=True))
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, draw: int, stream: int, numel: int) -> Words:
    """The words of elements 0 .. numel - 1 of one image."""
    counter = np.zeros((-(-numel // 4), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = np.arange(len(counter)), draw, stream
    return philox4x32_10(counter, (seed % 2**32, seed >> 32)).reshape(-1)[:numel]


def normals(seed: int, draw: int, stream: int, numel: int) -> Floats:
    """The normals of elements 0 .. numel - 1 of one image."""
    even = numel + numel % 2
    pairs = words(seed, draw, stream, even).reshape(-1, 2)
    return np.stack(box_muller(pairs[:, 0], pairs[:, 1]), axis=-1).reshape(-1)[:numel]


def box_muller(a: Words, b: Words) -> tuple[Floats, Floats]:
    """sqrt(-2 log u) (cos, sin)(2 pi b / 2^32), u = a / 2^32 + 2^-33, one rounding to float32 per operation."""
    r = np.sqrt(np.float32(-2) * log_of_unit(unit(a)))
    cosine, sine = cos_sin_of_turns(b)
    return r * cosine, r * sine


def edge_words() -> Words:
    """Words where rounding or a case may change: around eighths of 2^32, and around u = sqrt(1/2)."""
    centres = [k * 2**29 for k in range(8)] + [0xB504F300 + k * 256 for k in range(-2, 3)]
    return np.unique([(c + d) % 2**32 for c in centres for d in range(-20, 21)]).astype(np.uint32)


def unit(a: Words) -> Floats:
    """The u of a word, in (0, 1]."""
    return a.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def log_of_unit(u: Floats) -> Floats:
    """log u = e log 2 + log m for u = 2^e m and m in [sqrt(1/2), sqrt 2)."""
    m, e = np.frexp(u)  # m in [1/2, 1)
    small = m < np.float32(np.sqrt(0.5))
    m, e = np.where(small, m * np.float32(2), m), (e - small).astype(np.float32)
    t = m - np.float32(1)
    log_m = t + (t * t) * (polynomial(LOG, t) * t + np.float32(-0.5))
    return e * LN2_HI + (e * LN2_LO + log_m)


def cos_sin_of_turns(turns: Words) -> tuple[Floats, Floats]:
    """(cos, sin)(2 pi turns / 2^32): polynomials on the nearest quarter turn's remainder, then four cases."""
    quarter = np.round(turns / 2**30 + 2.0**-40).astype(np.int64)  # halves round up
    x = (turns.astype(np.int64) - quarter * 2**30).astype(np.float32) * STEP
    x2 = x * x
    sine = x + (x * x2) * polynomial(SIN, x2)
    cosine = np.float32(1) + x2 * polynomial(COS, x2)
    cases = [quarter % 4 == case for case in range(4)]
    return (
        np.select(cases, [cosine, -sine, -cosine, sine]),
        np.select(cases, [sine, cosine, -sine, -cosine]),
    )


def polynomial(coefficients: Floats, x: Floats) -> Floats:
    """Horner's rule, lowest power first in `coefficients`."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
