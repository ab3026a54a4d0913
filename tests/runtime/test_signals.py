"""What SIGINT and SIGTERM do to a command."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vaebm_fast.runtime.signals import STOP, handled, interruptible, noted


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP]


@pytest.mark.parametrize("number", STOP)
def test_the_first_signal_interrupts_and_later_ones_do_not_cut_the_ending_off(number: signal.Signals) -> None:
    before, ended = handlers(), False
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            ended = True
    assert ended and handlers() == before


def test_a_noted_signal_is_told_and_a_second_ctrl_c_interrupts() -> None:
    before = handlers()
    with noted() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_in_a_thread_nothing_changes() -> None:
    before, seen = handlers(), []

    def body() -> None:
        with handled(STOP, signal.SIG_IGN), noted() as stopped:
            seen.append((handlers() == before, stopped()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
