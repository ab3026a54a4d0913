"""Are the design's GPU targets met? Computed only from results of `make gpu`.

One table per GPU. Steps are rows of `pair*_cuda.json`, chains and sampling jobs of `chain_*_cuda.json`. Targets for
batches of 16 or more use the smallest such batch that was measured, and the fastest frozen pair. Ratios are taken
within one file, that is one run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import PLAIN
from benchmarks.results_file import Row
from benchmarks.step.chain_candidates import BARE, COLD, JOB
from benchmarks.step.pair import COMPILED_BF16

Contents = Sequence[dict[str, Any]]  # result files of one GPU
Find = Callable[[Contents], "Found | None"]

SMALLEST_BATCH = 16
# Milliseconds per image and step, celeba_256, bfloat16. The design names A100 and H200; the H100, which has the H200's
# cores and slower memory, gets the same target.
STEP_MS = {"A100": 1.8, "H100": 0.6, "H200": 0.6}
OVER_PLAIN, OVER_COMPILED, JOB_SHARE = 10.0, 2.0, 0.95


@dataclass(frozen=True)
class Found:
    """A figure and the row that it comes from."""

    value: float
    row: Row


@dataclass(frozen=True)
class Target:
    """A figure with an upper or lower `bound`; `find` returns None if it was not measured."""

    name: str
    find: Find
    bound: float
    is_upper: bool = False
    unit: str = ""

    def line(self, contents: Contents) -> str:
        """The target's line of the table."""
        asked, found = f"{'<=' if self.is_upper else '>='} {self.bound:g}{self.unit}", self.find(contents)
        if found is None:
            return f"| {self.name} | {asked} | not measured | not measured |"
        holds = found.value <= self.bound if self.is_upper else found.value >= self.bound
        ran = f"{found.row['candidate']}, {found.row['backend']}, N = {found.row['batch']}"
        if str(found.row["launched"]).startswith("eager:"):
            ran += ", not captured"
        return f"| {self.name} | {asked} | {found.value:.3g}{self.unit} ({ran}) | {'yes' if holds else 'no'} |"


def targets(gpu: str) -> list[Target]:
    """All targets; those in milliseconds only for the GPUs in STEP_MS."""
    step_ms = next((ms for name, ms in STEP_MS.items() if name in gpu), None)
    asked: list[Target] = []
    if step_ms is not None:
        asked = [
            Target("celeba_256, step, per image", _ms(_is_frozen_step), step_ms, is_upper=True, unit=" ms"),
            Target("celeba_256, chain, per image and step", _ms(_is_bare), step_ms, is_upper=True, unit=" ms"),
        ]
    for preset in ("celeba_256", "celeba_64"):
        for what, is_fast in (("step", _is_frozen_step), ("chain", _is_bare)):
            over_plain, over_compiled = (_ratio(preset, is_fast, slow) for slow in (PLAIN, COMPILED_BF16))
            asked += [
                Target(f"{preset}, {what}, over the plain modules", over_plain, OVER_PLAIN, unit="x"),
                Target(f"{preset}, {what}, over torch.compile", over_compiled, OVER_COMPILED, unit="x"),
            ]
        asked.append(Target(f"{preset}, sampling job over bare chain", _job_share(preset), JOB_SHARE, unit="x"))
    return asked


def _is_frozen_step(row: Row) -> bool:
    """Whether the row is a frozen pair in bfloat16, captured or eager."""
    return str(row["candidate"]).startswith("frozen") and row.get("dtype") == "bfloat16"


def _is_bare(row: Row) -> bool:
    return row["candidate"] == BARE and row.get("dtype") == "bfloat16"


def _seconds(row: Row) -> float:
    """Seconds per image and step of a step's or chain's row."""
    if "images_per_second" in row:
        return 1 / (row["images_per_second"] * row["steps"])
    return float(row["median_s"] / row["batch"])


def _rows(content: dict[str, Any], preset: str) -> list[Row]:
    return [row for row in content["results"] if row.get("preset") == preset and row["batch"] >= SMALLEST_BATCH]


def _best(rows: Iterable[Row]) -> Row | None:
    """The fastest row of the smallest batch."""
    return min(rows, key=lambda row: (row["batch"], _seconds(row)), default=None)


def _ms(is_fast: Callable[[Row], bool]) -> Find:
    """Milliseconds per image and step of celeba_256."""

    def find(contents: Contents) -> Found | None:
        best = _best(row for content in contents for row in _rows(content, "celeba_256") if is_fast(row))
        return None if best is None else Found(1e3 * _seconds(best), best)

    return find


def _ratio(preset: str, is_fast: Callable[[Row], bool], slow: str) -> Find:
    """Speed-up of the fast row over `slow`, for the smallest batch that has both in one file."""

    def find(contents: Contents) -> Found | None:
        found = []
        for content in contents:
            rows = _rows(content, preset)
            for base in (row for row in rows if row["candidate"] == slow):
                best = _best(row for row in rows if is_fast(row) and row["batch"] == base["batch"])
                if best is not None:
                    found.append(Found(_seconds(base) / _seconds(best), best))
        return min(found, key=lambda each: int(each.row["batch"]), default=None)

    return find


def _job_share(preset: str) -> Find:
    """The job's rate over that of a bare chain whose time includes the capture, as the job's does."""

    def find(contents: Contents) -> Found | None:
        for content in contents:
            rows = {row["candidate"]: row for row in _rows(content, preset)}
            if {JOB, COLD} <= set(rows):
                return Found(_seconds(rows[COLD]) / _seconds(rows[JOB]), rows[JOB])
        return None

    return find


def verdict(results: Path) -> str:
    """The tables for all GPUs with result files in the folder."""
    paths = sorted([*results.glob("pair*_cuda.json"), *results.glob("chain_*_cuda.json")])
    contents = [json.loads(path.read_text()) for path in paths]
    tables = []
    for gpu in sorted({content["environment"]["device"] for content in contents}):
        own = [content for content in contents if content["environment"]["device"] == gpu]
        lines = [
            "| target | bound | measured | holds |",
            "|---|---|---|---|",
            *(target.line(own) for target in targets(gpu)),
        ]
        commits = ", ".join(sorted({content["environment"]["commit"] for content in own}))
        tables.append(f"{gpu}, commit {commits}\n\n" + "\n".join(lines))
    return "\n\n".join(tables) or f"{results} holds no pair*_cuda.json and no chain_*_cuda.json: nothing was measured."
