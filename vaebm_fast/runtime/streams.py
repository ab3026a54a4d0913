"""Standard output and error that never stop the work: closed, without a reader, or without the characters to print."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

READER_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


@contextmanager
def standard_streams() -> Iterator[Callable[[], None]]:
    """Inside, `sys.stdout` and `sys.stderr` exist, replace characters that their encoding lacks, and drop what cannot
    be written.

    Yields a function that flushes both and raises the OSError of standard output if it dropped something for another
    reason than a reader that has gone, such as a full disk.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    streams = [Lenient(stream) for stream in before]

    def require_written() -> None:
        for stream in streams:
            stream.flush()
        failure = streams[0].failure
        if failure is not None and failure.errno not in READER_GONE:
            raise failure

    for stream in before:
        _reconfigure(stream, "replace")
    sys.stdout, sys.stderr = streams
    try:
        yield require_written
    finally:
        for lenient in streams:
            lenient.flush()
        sys.stdout, sys.stderr = before
        for stream, error in zip(before, errors, strict=True):
            _reconfigure(stream, error)


class Lenient:
    """A text stream that drops what cannot be written, and keeps the first error as `failure`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write or drop `text`."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self._stream.name
            self.failure = self.failure or error


def _open_closed() -> None:
    """Open the null device for standard streams that the shell closed: Python has None in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # the order of their descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, stays open


def _reconfigure(stream: TextIO, errors: str | None) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and errors is not None:
        reconfigure(errors=errors)
