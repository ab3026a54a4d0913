"""What a data set holds, in a few lines, and some of its images: for people, before they train on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaebm_fast.data.containers.base import summary
from vaebm_fast.data.images import Pixels, UnreadableImageError, decode
from vaebm_fast.data.prepared import LEFT_OUT, MANIFEST, rows_of
from vaebm_fast.data.sources import ImageSource, StoredImages

MOST_SIZES = 4  # named in a line; the others are counted


@dataclass(frozen=True)
class Overview:
    """Lines of text, and images spread over the set: uint8 [n, H, W, C], grey where unreadable, with captions."""

    lines: tuple[str, ...]
    images: Pixels
    captions: tuple[str, ...]


def overview(source: ImageSource, root: Path | None, most_images: int) -> Overview:
    """Of at most `most_images` images of the source. root: its folder, if `prepare` made it."""
    total = len(source)
    indices = np.unique(np.linspace(0, total - 1, min(total, most_images)).round().astype(np.int64))
    channels, size, _ = source.image_shape
    images = np.full((len(indices), size, size, channels), 128, np.uint8)
    captions, sizes, unreadable = [], Counter[tuple[int, int]](), []
    for row, index in enumerate(indices.tolist()):
        captions.append(str(index) if source.labels is None else f"{index}: class {source.labels[index]}")
        try:
            images[row] = source.read(indices[row : row + 1])[0]
            if isinstance(source, StoredImages):
                height, width = decode(source.container.read(index), channels).shape[:2]
                sizes[width, height] += 1
        except UnreadableImageError as error:
            captions[-1] = "unreadable"
            unreadable.append(error.fault)
    classes = "" if source.labels is None else f", {len(np.unique(source.labels))} classes"
    lines = [
        f"{source.name}: {total:,} images, read as {size}x{size}x{channels}, transform {source.transform}{classes}"
    ]
    if root is not None and (root / MANIFEST).is_file():
        split = source.name.rpartition(", ")[2]
        rows = rows_of(root / f"{split}.jsonl")
        lines.append(f"sizes before: {_sizes(Counter((row['width'], row['height']) for row in rows))}")
        left_out = Counter(row["why"] for row in rows_of(root / LEFT_OUT))
        lines += [f"left out: {_counted(left_out.most_common(MOST_SIZES))}"] if left_out else []
    elif sizes:
        lines.append(f"sizes before, of the {len(indices)} shown: {_sizes(sizes)}")
    if isinstance(source, StoredImages) and source.container.passed_over:
        lines.append(f"passed over: {summary(source.container.passed_over)}")
    lines += unreadable
    return Overview(tuple(lines), images, tuple(captions))


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    shown = _counted((f"{width}x{height}", count) for (width, height), count in sizes.most_common(MOST_SIZES))
    others = len(sizes) - MOST_SIZES
    return f"{shown}, and {others} other sizes" if others > 0 else shown


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in items)
