"""Temporary handlers for SIGINT and SIGTERM, the two signals that stop a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
STOP = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Inside, `handler` receives these signals. Only the main thread handles signals: elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises KeyboardInterrupt; later ones are ignored until the end.

    The cleanup after the interruption is short and must not be interrupted itself.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in STOP:
            signal.signal(each, lambda *_: None)  # SIG_IGN would print a traceback for a signal already pending
        raise KeyboardInterrupt

    with handled(STOP, interrupt):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM arrived; a later SIGINT raises KeyboardInterrupt."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    with handled(STOP, remember):
        yield lambda: bool(received)
