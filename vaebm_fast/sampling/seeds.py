"""The seeds of a job, kept as ranges and split into blocks."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate

from vaebm_fast.runtime.errors import UserError

MOST_SEEDS = 100_000_000  # per job, which keeps a list of its blocks


class Seeds:
    """Distinct seeds in ascending order, as ranges. A job distributes blocks of them over its processes."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = tuple(ranges)
        self._ends = list(accumulate(map(len, self.ranges)))

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """Parse `0-99,200-299,1000`. Raises UserError for other forms, repeated seeds or more than MOST_SEEDS."""
        ranges = []
        for word in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word, re.ASCII)
            if match is None:
                raise UserError(f"Seeds {word.strip()!r} are not of the form FIRST-LAST or SEED, such as 0-49999.")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last >= 2**64:
                raise UserError(f"Seeds {word.strip()!r} are not an ascending range within 0 to 2^64-1.")
            if last - first >= 2**40:
                raise UserError(f"Seeds {word.strip()!r} are 2^40 images or more; give fewer.")
            ranges.append(range(first, last + 1))
        seeds = cls(_joined(sorted(ranges, key=lambda seeds: seeds.start)))
        if len(seeds) > MOST_SEEDS:
            raise UserError(f"{len(seeds):,} seeds are too many for one folder, which takes at most {MOST_SEEDS:,}.")
        return seeds

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __str__(self) -> str:
        return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in self.ranges)

    @property
    def largest(self) -> int:
        """The largest seed."""
        return self.ranges[-1][-1]

    def between(self, first: int, stop: int) -> list[int]:
        """The seeds at positions first, ..., stop - 1; positions beyond the last seed give none."""
        at = bisect_right(self._ends, first)
        found: list[int] = []
        for seeds, end in zip(self.ranges[at:], self._ends[at:], strict=True):
            if end - len(seeds) >= stop:
                break
            skipped = end - len(seeds)
            found += seeds[max(0, first - skipped) : stop - skipped]
        return found

    def total_blocks(self, batch_size: int) -> int:
        """The number of blocks of `batch_size` seeds."""
        return -(-len(self) // batch_size)

    def block(self, index: int, batch_size: int) -> list[int]:
        """Block `index` of `batch_size` seeds; the last may be smaller."""
        return self.between(index * batch_size, (index + 1) * batch_size)

    def without(self, left_out: Collection[int]) -> str:
        """All seeds except these, in the form that `parse` reads; empty if none is left."""
        kept = []
        for seeds in self.ranges:
            start = seeds.start
            for seed in sorted(seed for seed in left_out if seed in seeds):
                kept.append(range(start, seed))
                start = seed + 1
            kept.append(range(start, seeds.stop))
        return str(Seeds([seeds for seeds in kept if seeds]))


def _joined(ranges: Sequence[range]) -> list[range]:
    """Ascending ranges with adjacent ones merged, so that equal seeds have one spelling."""
    joined: list[range] = []
    for seeds in ranges:
        if joined and seeds.start < joined[-1].stop:
            raise UserError(f"Seed {seeds.start} is given twice; give each seed once.")
        if joined and seeds.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, seeds.stop)
        else:
            joined.append(seeds)
    return joined
