"""Sound JPEG files have no fault in their coded stream; damage in it, which Pillow decodes silently, is found."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vaebm_fast.data.jpeg import stream_fault
from vaebm_fast.runtime import extension

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the compiled part is not built")

SHARED = [parent / "shared/data/portraits_256" for parent in Path(__file__).resolve().parents]
PORTRAITS = next((folder for folder in SHARED if folder.is_dir()), None)
EOI = b"\xff\xd9"


def save(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.merge(mode, [Image.fromarray(pixels[:, :, band]) for band in range(bands)])


def scene(seed: int) -> Image.Image:
    """256 x 256: a few coloured patches with soft edges and some grain."""
    grain = np.asarray(noise(256, 256, seed=seed), np.float32) - 127.5
    soft = np.asarray(noise(12, 12, seed=seed + 999).resize((256, 256), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((soft + 0.05 * grain).clip(0, 255).astype(np.uint8))


@cache
def files(source: str, **options: Any) -> list[bytes]:
    """The JPEG files of a source; re-saved if there are options."""
    if source == "scenes":
        return [save(scene(seed), quality=85, **options) for seed in range(100)]
    if PORTRAITS is None:
        pytest.skip("shared/data/portraits_256 is not beside the checkout")
    paths = sorted(PORTRAITS.glob("*.jpg"))
    return [save(Image.open(path), quality=85, **options) if options else path.read_bytes() for path in paths]


# Files written here, in which each code is known: DC codes are the 4 bits of their size, AC codes the 8 bits of their
# symbol; the last of each, which is of ones only, is not in the tables.


def segment(marker: int, *payload: int) -> bytes:
    return bytes([0xFF, marker, *divmod(len(payload) + 2, 256), *payload])


def table(to: int, length: int, symbols: Sequence[int]) -> bytes:
    return segment(0xC4, to, *(len(symbols) * (at == length) for at in range(1, 17)), *symbols)


TABLES = table(0x00, 4, range(15)) + table(0x10, 8, range(255))
DC0, EOB, ZRL = "0000", "00000000", "11110000"
EMPTY = DC0 + EOB  # a block


def ac(run: int, size: int, bits: str) -> str:
    assert len(bits) == size
    return f"{run:04b}{size:04b}{bits}"


def coded(bits: str, padding: str = "1") -> bytes:
    bits += padding * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")


def frame(
    width: int = 8,
    height: int = 8,
    marker: int = 0xC0,
    precision: int = 8,
    factors: Sequence[int] = (0x11,),
    ids: Sequence[int] = (1, 2, 3, 4, 5),
) -> bytes:
    parts = [byte for each, factor in zip(ids, factors, strict=False) for byte in (each, factor, 0)]
    quantisation = segment(0xDB, 0, *[1] * 64)
    return quantisation + segment(marker, precision, *divmod(height, 256), *divmod(width, 256), len(factors), *parts)


def scan(bits: str | bytes, *ids: int, band: Sequence[int] = (0, 63, 0)) -> bytes:
    head = segment(0xDA, len(ids or (1,)), *(byte for each in ids or (1,) for byte in (each, 0)), *band)
    return head + (coded(bits) if isinstance(bits, str) else bits)


def jpeg(*parts: bytes, tables: bytes = TABLES, end: bytes = EOI) -> bytes:
    return b"\xff\xd8" + tables + b"".join(parts) + end


def progressive(*scans: bytes, width: int = 16) -> bytes:
    return jpeg(frame(width, marker=0xC2), *scans)


DC_FIRST = scan(DC0 * 2, band=(0, 0, 0x01))
AC_FIRST = scan(ac(0, 1, "1") + EOB + ac(4, 1, "0") + ac(0, 1, "1") + EOB, band=(1, 63, 0x01))


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_pillow_saves_is_sound(mode: str, options: dict[str, Any]) -> None:
    for width, height in ((1, 1), (7, 9), (17, 33), (64, 64)):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1") if mode == "RGB" else ("4:4:4",):
            for quality in (1, 30, 75, 95, 100):
                data = save(noise(width, height, mode), quality=quality, subsampling=subsampling, **options)
                assert stream_fault(data) is None, (width, height, subsampling, quality)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_every_quality_and_the_steepest_pixels_are_sound(options: dict[str, Any]) -> None:
    steep = Image.fromarray(((np.indices((40, 40)).sum(0) // 8 % 2) * 255).astype(np.uint8))
    steps = Image.fromarray(((np.indices((40, 40)).sum(0) % 2) * 255).astype(np.uint8))
    for quality in range(1, 101):
        for image in (steep, steps, scene(quality).crop((0, 0, 40, 40)), Image.new("L", (16, 16), 255)):
            assert stream_fault(save(image, quality=quality, **options)) is None, quality


def test_restart_intervals_of_more_than_eight_markers_are_sound() -> None:
    for options in ({"restart_marker_blocks": 1}, {"restart_marker_rows": 1}):
        for progressive in (False, True):
            assert stream_fault(save(scene(0), progressive=progressive, **options)) is None


@pytest.mark.parametrize("source", ["scenes", "portraits"])
def test_images_are_sound(source: str) -> None:
    faults = list(map(stream_fault, files(source) + files(source, progressive=True)))
    assert faults == [None] * len(faults)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(frame(), scan(EMPTY)),
        jpeg(frame(), scan(coded(EMPTY, padding="0"))),
        jpeg(frame(), scan(coded(EMPTY) + b"\0\1\2\3")),
        jpeg(frame(), scan(EMPTY), end=EOI + b"more \xff\xda" + EOI),
        jpeg(frame(), scan(EMPTY), end=b"\xff\xff\xff" + EOI),
        jpeg(b"\xff\xff", segment(0xEA, *range(100)), segment(0xFE), b"junk", frame(), b"\xff\x01", scan(EMPTY)),
        jpeg(frame(16), segment(0xDD, 0, 1), scan(coded(EMPTY) + b"\xff\xff\xd0" + coded(EMPTY) + b"\xff\xd1")),
        jpeg(frame(), scan(DC0 + ZRL * 3 + EOB)),
        jpeg(frame(), scan(DC0 + ac(0, 10, "1" * 10) * 63)),
        jpeg(frame(), scan("1010" + "0" * 10 + EOB)),  # the least DC value of 8 bits but one: -1023
        jpeg(frame(marker=0xC1, precision=12), scan("1110" + "1" * 14 + ac(0, 14, "1" * 14) * 63)),
        jpeg(frame(), scan(EMPTY), tables=table(0x00, 4, range(16)) + table(0x10, 8, range(255))),
        jpeg(frame(17, 9, factors=(0x22, 0x11, 0x11)), scan(EMPTY * 6, 1), scan(EMPTY * 2, 2), scan(EMPTY * 2, 3)),
        jpeg(frame(17, 9, factors=(0x22, 0x11, 0x11)), scan(EMPTY * 6 * 2, 1, 2, 3)),
        jpeg(frame(17, 9, factors=(0x22, 0x11, 0x11)), scan(EMPTY * 5 * 2, 1, 3), scan(EMPTY * 2, 2)),
        jpeg(frame(17, 9, factors=(0x22,)), scan(EMPTY * 6)),
        jpeg(frame(17, 9, factors=(0x22, 0x11), ids=(7, 7)), scan(EMPTY * 5 * 2, 7, 7)),
        jpeg(frame(), scan(EMPTY, band=(0, 0, 0x31))),
        progressive(scan(DC0 * 2, band=(0, 0, 0))),
        progressive(DC_FIRST, AC_FIRST),
        # Two known coefficients and one before the new one of block 1, whose band then ends with that of block 2.
        progressive(
            DC_FIRST,
            AC_FIRST,
            scan("01", band=(0, 0, 0x10)),
            scan(ac(2, 1, "1") + "0" + "00010000" + "0" + "01", band=(1, 63, 0x10)),
        ),
    ],
)
def test_odd_but_valid_files_are_sound(data: bytes) -> None:
    assert stream_fault(data) is None


REFINE = (1, 63, 0x10)
FAULTS = [
    ("the file does not begin with an SOI marker", b""),
    ("there is no EOI marker", jpeg(frame(), scan(EMPTY), end=b"")),
    ("there is no frame", jpeg()),
    ("component 3 has no scan", jpeg(frame(factors=(0x11,) * 3), scan(EMPTY * 2, 1, 2))),
    ("byte 412 is no marker, though one is due", jpeg(frame(), scan(EMPTY), segment(0xFE), b"junk")),
    ("the segment at byte 4 does not end in the file", jpeg(tables=b"\xff\xe0\x70\x00")),
    ("the segment at byte 4 is too short", jpeg(tables=segment(0xDB, 0, 1, 1))),
    ("there is a marker of no meaning before byte 4", jpeg(tables=segment(0x02, 1))),
    ("there is no Huffman table 36", jpeg(tables=segment(0xC4, 0x24))),
    ("there is no quantisation table 4", jpeg(tables=segment(0xDB, 4))),
    ("a Huffman table has more codes than fit", jpeg(tables=table(0x00, 3, range(9)))),
    ("there is a second frame", jpeg(frame(), frame())),
    ("the samples have 12 bits", jpeg(frame(precision=12))),
    ("there are no pixels", jpeg(frame(width=0))),
    ("component 1 has impossible parameters", jpeg(frame(factors=(0x51,)))),
    ("the file is too short for its pixels", jpeg(frame(60000, 60000))),
    ("there is a scan before the frame", jpeg(scan(EMPTY))),
    ("a scan has component 2, which the frame does not have", jpeg(frame(), scan(EMPTY, 2))),
    ("a scan has impossible parameters", progressive(scan(DC0 * 2, band=(0, 5, 0)))),
    ("a scan of AC coefficients precedes that of DC", progressive(AC_FIRST)),
    ("a scan does not continue those before", jpeg(frame(), scan(EMPTY), scan(EMPTY))),
    ("a scan has a Huffman table that is not defined", jpeg(frame(), scan(EMPTY), tables=table(0x00, 4, range(15)))),
    (
        "restart marker 3 where 0 is due",
        jpeg(frame(16), segment(0xDD, 0, 1), scan(coded(EMPTY) + b"\xff\xd3" + coded(EMPTY))),
    ),
    ("the stream ends where restart marker 0 is due", jpeg(frame(16), segment(0xDD, 0, 1), scan(EMPTY))),
    ("the stream ends 3 blocks early", jpeg(frame(40), scan(EMPTY * 2))),
    ("the stream ends 2 blocks early", progressive(DC_FIRST, scan("", band=(1, 63, 0x01)))),
    ("5 bytes are left over after the last block", jpeg(frame(), scan(coded(EMPTY) + b"\0" * 5))),
    (
        "there is a run of 1 empty blocks past the last one at byte",
        progressive(DC_FIRST, scan("00010" + "00010001", band=(1, 63, 0x01))),
    ),
    ("there is a code that is not in its Huffman table at byte 406", jpeg(frame(), scan(DC0 + "1" * 12))),
    (
        "there is a code that is not in its Huffman table at byte 409",
        jpeg(frame(), scan("1000" + "1" * 8 + ac(15, 1, "0") + "1" * 9)),
    ),
    ("there is a DC difference of 12 bits at byte", jpeg(frame(), scan("1100" + "1" * 12 + EOB))),
    ("there is a DC value out of range at byte", jpeg(frame(16), scan(("1010" + "1" * 10 + EOB) * 2))),
    ("there is a symbol of no meaning at byte", jpeg(frame(), scan(DC0 + ac(3, 0, "")))),
    ("there is coefficient 64 of 63 at byte", jpeg(frame(), scan(DC0 + ac(15, 1, "1") * 3 + ac(15, 1, "1") + EOB))),
    ("there is coefficient 64 of 63 at byte", jpeg(frame(), scan(DC0 + ac(14, 1, "1") + ac(15, 1, "1") * 2 + ZRL))),
    ("there is coefficient 65 of 63 at byte", jpeg(frame(), scan(DC0 + ZRL * 4 + EOB))),
    ("there is a coefficient of 11 bits at byte", jpeg(frame(), scan(DC0 + ac(0, 11, "1" * 11) + EOB))),
    ("there is coefficient 6 of 5 at byte", progressive(DC_FIRST, scan(ac(5, 1, "1") + EOB * 3, band=(1, 5, 0)))),
    (
        "there is a coefficient of 10 bits at byte",
        progressive(DC_FIRST, scan(ac(0, 10, "1" * 10) + EOB * 2, band=(1, 63, 0x01))),
    ),
    (
        "there is a new coefficient of 2 bits in a scan that refines",
        progressive(DC_FIRST, AC_FIRST, scan(ac(0, 2, "11") + EOB * 5, band=REFINE)),
    ),
    (
        "there is coefficient 64 of 63 at byte",
        progressive(DC_FIRST, AC_FIRST, scan(ZRL + "0" + ZRL * 2 + ac(14, 1, "1") + EOB * 9, band=REFINE)),
    ),
]


@pytest.mark.parametrize("phrase, data", FAULTS)
def test_each_fault_is_said(phrase: str, data: bytes) -> None:
    fault = stream_fault(data)
    assert fault is not None and fault.startswith(phrase)


def test_what_is_not_checked_has_no_fault() -> None:
    for marker in (0xC3, 0xC5, 0xC9, 0xCA, 0xCC, 0xDE, 0xF0, 0xF7):
        assert stream_fault(jpeg(segment(marker, *range(20)))) is None
    assert stream_fault(jpeg(frame(height=0))) is None
    assert stream_fault(jpeg(frame(factors=[0x11] * 5))) is None
    assert stream_fault(jpeg(frame(65535, 65535, factors=[0x11] * 4))) is None
    assert stream_fault(jpeg(frame(), scan(EMPTY * 3), tables=b"")) is None


def test_without_the_compiled_part_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "is_available", lambda: False)
    assert stream_fault(b"") is None


Damage = Callable[[bytes, random.Random, int, int], bytes]


def bit(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def byte(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end)
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def zeroed(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end - 64)
    return data[:at] + bytes(64) + data[at + 64 :]


def dropped(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end - 16)
    return data[:at] + data[at + 16 :]


def randomised(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    at = rng.randrange(begin, end - 512)
    return data[:at] + rng.randbytes(512) + data[at + 512 :]


def cut(data: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    return data[: rng.randrange(begin, end)] + EOI


# The least share that must be found, in baseline and progressive files; what is missed leaves a stream that an encoder
# may write.
LEAST: dict[str, dict[Damage, tuple[float, float]]] = {
    "portraits": {
        bit: (0.30, 0.45),
        byte: (0.48, 0.68),
        zeroed: (0.94, 0.96),
        dropped: (0.84, 0.95),
        randomised: (0.99, 0.99),
        cut: (0.99, 0.99),
    },
    "scenes": {
        bit: (0.25, 0.20),
        byte: (0.33, 0.43),
        zeroed: (0.93, 0.65),
        dropped: (0.78, 0.60),
        randomised: (0.99, 0.99),
        cut: (0.99, 0.96),
    },
}


@pytest.mark.parametrize("source", LEAST)
@pytest.mark.parametrize("damage", LEAST["scenes"])
def test_damage_is_found(damage: Damage, source: str) -> None:
    for least, options in zip(LEAST[source][damage], ({}, {"progressive": True}), strict=True):
        rng, damaged = random.Random(0), []
        for data in files(source, **options):
            begin, end = data.index(b"\xff\xda") + 14, len(data) - 2
            if end - begin > 600:
                damaged.append(damage(data, rng, begin, end))
        found = sum(stream_fault(data) is not None for data in damaged)
        assert found >= least * len(damaged) > 0, f"{found} of {len(damaged)}"


def test_threads_find_the_same_faults() -> None:
    rng = random.Random(1)
    damaged = [byte(data, rng, 700, len(data) - 2) for data in files("scenes")]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream_fault, damaged * 4)) == list(map(stream_fault, damaged)) * 4


HEADS = [
    jpeg(frame(33, 17, 0xC0, factors=(0x22, 0x11, 0x11)), scan("", 1, 2, 3), end=b""),
    jpeg(frame(33, 17, 0xC0), segment(0xDD, 0, 2), scan(""), end=b""),
    jpeg(frame(33, 17, 0xC2), scan(DC0 * 15, band=(0, 0, 1)), scan("", band=(1, 63, 1)), end=b""),
    progressive(DC_FIRST, AC_FIRST, scan("", band=REFINE))[:-2],
    b"\xff\xd8",
    b"",
]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=600))
def test_arbitrary_bytes_have_an_answer(head: bytes, tail: bytes) -> None:
    for data in (head + tail, head + tail.replace(b"\xff", b"\xff\0") + EOI):
        assert stream_fault(data) != ""


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1), st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), max_size=8))
def test_arbitrary_damage_has_an_answer(progressive: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(files("scenes", progressive=bool(progressive))[0])
    for at, value in changes:
        data[at] = value
    assert stream_fault(bytes(data)) != ""
