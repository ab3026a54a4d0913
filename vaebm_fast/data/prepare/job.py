"""Decodes, checks and writes the images of one split, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vaebm_fast.data.images import UnfitImageError, UnreadableImageError, crop_square, decoding, transformed
from vaebm_fast.data.jpeg import stream_fault
from vaebm_fast.data.prepare.options import PrepareOptions
from vaebm_fast.data.prepare.parts import Part
from vaebm_fast.data.prepare.writers import open_writer, png_file
from vaebm_fast.data.sources import identity, unfit
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import append, write

CHECKED = 50  # images of those saved that are read again before a run is continued
AHEAD = 4  # images per thread that are decoded before they can be written
Row = dict[str, Any]


class Job:
    """Writes the images of one split in blocks, each followed by its rows in a journal, from which it goes on."""

    def __init__(self, part: Part, partial: Path, options: PrepareOptions) -> None:
        self._part, self._options = part, options
        self._journal, self._threads = partial / f"{part.split}.journal", len(os.sched_getaffinity(0))
        shape = (options.size, options.size, options.channels)
        self._writer = open_writer(partial, part.split, options.format, shape)
        self._rows: list[Row] = []  # of what is on the disk
        self._written = 0  # images there
        self._block: list[tuple[Row, Any]] = []
        self._images_of_block = 0
        self._is_saving = False

    def run(self, progress: bool) -> list[Row]:
        """A row per image, in order; those of damaged ones have the reason as `why`."""
        part, writer = self._part, self._writer
        self._rows = self._saved()
        self._written = _total_good(self._rows)
        left = part.indices[len(self._rows) :]
        shown = tqdm(
            total=len(part.indices),
            initial=len(self._rows),
            desc=part.split,
            disable=None if progress else True,
            unit="image",
        )
        with ThreadPoolExecutor(self._threads) as pool, shown:
            try:
                for row, data in self._examined(pool, left):
                    self._require_usable(row)
                    self._block.append((row, data))
                    self._images_of_block += data is not None
                    shown.update()
                    if self._images_of_block == writer.block:
                        self._save()
                self._save()
            except BaseException:
                if not (self._is_saving or writer.only_whole_blocks):
                    self._save()
                raise
        if self._written:
            writer.finish(self._written)
        return self._rows

    def _require_usable(self, row: Row) -> None:
        if "why" in row and self._options.on_bad == "error":
            raise UserError(
                f"{self._part.container.where(row['index'])} cannot be used ({row['why'].rstrip('.')}). Replace it, or "
                "leave such images out with --on-bad skip; the same command continues."
            )

    def _save(self) -> None:
        """Put the block on the disk, first its images, then its rows. After an error it is not tried again."""
        self._is_saving = True
        rows = [row for row, _ in self._block]
        images = [(data, row.get("label")) for row, data in self._block if "why" not in row]
        if images:
            self._writer.write(self._written, images)
        if rows:
            append(self._journal, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._rows += rows
        self._written += len(images)
        self._block, self._images_of_block = [], 0
        self._is_saving = False

    def _saved(self) -> list[Row]:
        """The rows of the journal, which is cut where a crash left a line or a block incomplete.

        Raises UserError if the files are not those of the journal, or the images not those that it names.
        """
        rows = _journal(self._journal)
        if self._writer.only_whole_blocks and len(rows) < len(self._part.indices):
            good = [number for number, row in enumerate(rows) if "why" not in row]
            whole = len(good) // self._writer.block * self._writer.block
            rows = rows[: good[whole - 1] + 1 if whole else 0]
        data = "".join(json.dumps(row) + "\n" for row in rows)
        if self._journal.exists():
            write(self._journal, data, durable=True)
        self._writer.require(_total_good(rows))
        container = self._part.container
        for row in rows[:: max(1, len(rows) // CHECKED)]:
            if "sha256" in row and identity(container.read(row["index"])) != (row["bytes"], row["sha256"]):
                raise UserError(
                    f"{container.where(row['index'])} has changed since this was begun; name another folder, or remove "
                    f"{self._journal.parent}."
                )
        return rows

    def _examined(self, pool: ThreadPoolExecutor, indices: Sequence[int]) -> Iterator[tuple[Row, Any]]:
        """(row, what the writer takes or None) of each image in order, some of them ahead with threads."""
        ahead: deque[Future[tuple[Row, Any]]] = deque()
        try:
            for index in indices:
                ahead.append(pool.submit(self._examine, int(index)))
                if len(ahead) > AHEAD * self._threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _examine(self, index: int) -> tuple[Row, Any]:
        container, options = self._part.container, self._options
        row: Row = {"key": container.names[index], "index": index}
        try:
            record = container.read(index)
            row["bytes"], row["sha256"] = identity(record)
            with decoding(record, options.channels) as whole:
                row["height"], row["width"] = whole.shape[:2]
                if isinstance(record, bytes) and record.startswith(b"\xff\xd8"):
                    fault = stream_fault(record)
                    if fault is not None:
                        raise UserError(fault)
                pixels = transformed(whole, self._part.transform, options.size)
            del whole
        except UnfitImageError as error:
            raise unfit(container.where(index), self._part.transform, error) from error
        except MemoryError as error:
            raise UserError(f"{container.where(index)} does not fit in memory.") from error
        except Exception as error:
            unreadable = UnreadableImageError(container.where(index), error, container.names[index])
            if not unreadable.is_damaged:
                raise unreadable from error
            return {**row, "why": unreadable.why}, None
        if options.format == "array":
            pixels = np.ascontiguousarray(crop_square(pixels, options.size))
        row["pixels_sha256"] = identity(pixels)[1]
        if container.labels is not None:
            row["label"] = int(container.labels[index])
        return row, pixels if options.format == "array" else png_file(pixels)


def _total_good(rows: Sequence[Row]) -> int:
    return sum("why" not in row for row in rows)


def _journal(path: Path) -> list[Row]:
    """The rows of a journal, without a line that a crash cut short. Raises UserError if another line is damaged."""
    if not path.exists():
        return []
    data = path.read_bytes()
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove its folder and begin anew.") from error
