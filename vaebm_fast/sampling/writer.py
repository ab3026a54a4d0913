"""Encodes and writes blocks on background threads during computation; PNG encoding releases the GIL."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from vaebm_fast.sampling.blocks import Block
from vaebm_fast.sampling.folder import Folder
from vaebm_fast.sampling.journal import Journal, Record
from vaebm_fast.sampling.outputs import Output


class Writer:
    """Accepts computed blocks; `submit` blocks while two per thread are queued.

    A failed write raises its SamplingError in a later `submit` or on exit. On exit after another error or an
    interruption, submitted blocks are still written.
    """

    def __init__(self, folder: Folder, output: Output, journal: Journal, threads: int) -> None:
        self._folder, self._output, self._journal = folder, output, journal
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._most = 2 * threads
        self._waiting: deque[Future[None]] = deque()

    def submit(self, block: Block) -> None:
        """Queue the block to be encoded, written and journalled."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._most):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, block))

    def _write(self, block: Block) -> None:
        encoded = self._output.encode(block.index, block.seeds, block.on_host())
        files = {name: self._folder.write(name, data) for name, data in encoded.items()}
        self._journal.add(
            Record(
                block.index,
                images=len(block.seeds),
                computed_at_once=block.computed_at_once,
                files=files,
                redone=block.redone,
                failed=block.failed,
            )
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            for future in self._waiting:
                future.result()
