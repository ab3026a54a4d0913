"""Journals of finished blocks: one JSON line per block, one journal per process; verified against the files.

A line is written and fsynced after the block's files. A truncated last line is ignored.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vaebm_fast.runtime.errors import AGAIN
from vaebm_fast.runtime.files import append
from vaebm_fast.sampling.folder import Folder, SamplingError

MERGED = "journal.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished block: SHA-256 per file, number of images, and the seeds whose chains were not finite.

    redone: seeds whose chain was not finite at first and finite when rerun. failed: not finite twice, so no image.
    computed_at_once: images per batch; fewer than the block holds if memory ran out.
    """

    block: int
    images: int
    computed_at_once: int
    files: Mapping[str, str]
    redone: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


class Journal:
    """The journal of one process; its writing threads share it."""

    def __init__(self, folder: Folder, rank: int) -> None:
        self._folder, self._path = folder, folder.state / f"journal.{rank}.jsonl"
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Append a record durably."""
        with self._lock, self._folder.naming(self._path):
            append(self._path, json.dumps(asdict(record)).encode() + b"\n")


def read(folder: Folder) -> list[Record]:
    """The records of all journals."""
    return [record for path in _journals(folder) for record in _records(path.read_bytes())]


def read_all(folder: Folder, total_blocks: int) -> dict[int, Record]:
    """Records by block, after all processes have finished. Raises SamplingError if some are not visible yet: a network
    file system may show another machine's new file a minute late.
    """
    records = {record.block: record for record in read(folder)}
    if len(records) < total_blocks:
        raise SamplingError(
            f"{folder.state} shows records of only {len(records)} of {total_blocks} finished blocks; wait a "
            f"minute if other machines wrote them, then {AGAIN}."
        )
    return records


def merge(folder: Folder, records: Iterable[Record]) -> None:
    """Keep only these records, in one merged journal; delete the per-process journals."""
    lines = [json.dumps(asdict(record)) + "\n" for record in sorted(records, key=lambda record: record.block)]
    folder.write(f"{folder.state.name}/{MERGED}", "".join(lines).encode(), durable=True)
    for path in _journals(folder):
        if path.name != MERGED:
            path.unlink()


def intact(folder: Folder, records: Iterable[Record]) -> dict[int, Record]:
    """Records by block whose files all match their SHA-256; hashing is cheap compared with sampling."""

    def is_intact(record: Record) -> bool:
        return all(folder.is_intact(name, sha256) for name, sha256 in record.files.items())

    records = list(records)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(is_intact, records))
    return {record.block: record for record, good in zip(records, found, strict=True) if good}


class Watcher:
    """Counts the images that all processes finish, from lines appended to their journals."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new_images(self) -> int:
        """Images in records added since the last call."""
        images = 0
        for path in _journals(self._folder):
            if path.name == MERGED:
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            images += sum(record.images for record in _records(whole))
        return images


def _journals(folder: Folder) -> list[Path]:
    return sorted(folder.state.glob("journal*.jsonl"))


def _records(content: bytes) -> Iterator[Record]:
    for line in content.splitlines():
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError):
            continue  # truncated by a kill or corrupted by a crash: its block is recomputed
