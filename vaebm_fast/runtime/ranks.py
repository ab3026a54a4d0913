"""The ranks of a job, started here or by torchrun. They communicate when all are ready and when all are done."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from vaebm_fast.runtime import command
from vaebm_fast.runtime.errors import AGAIN, UserError
from vaebm_fast.runtime.signals import handled

LONGEST = timedelta(days=7)  # timeout of one rank's wait for another
POLL_S = 0.2
GRACE_S = 10

T = TypeVar("T")


class ProcessLostError(UserError):
    """Another process of the job ended early; it printed the reason, or was killed."""


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `world`, and `local_rank` of `local_world` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def speaks(self) -> bool:
        """Whether this is the process of its machine that prints messages for all."""
        return self.local_rank == 0

    def exchange(self, value: T) -> list[T]:
        """All-gather: the values of all processes, by rank. Raises ProcessLostError if one ended."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        with _losing_none():
            distributed.all_gather_object(values, value)
        return values

    def wait(self, meanwhile: Callable[[], object]) -> None:
        """Barrier over all processes; calls `meanwhile` every POLL_S. Raises ProcessLostError if one ended."""
        if self.world == 1:
            return
        with _losing_none():
            work = distributed.barrier(async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(POLL_S)
            work.wait()


@contextmanager
def _losing_none() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(f"Another process of this job has ended early; {AGAIN}.") from error


@contextmanager
def joined(ranks: Ranks, store: Path | None = None) -> Iterator[Ranks]:
    """Inside, a gloo process group connects the ranks, through the file `store` or torchrun's environment."""
    if ranks.world > 1:
        # An import while the group exists would make it a default argument there, which outlives it: its threads would
        # then run into the interpreter's end, where one that frees a Python object aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        meeting = f"file://{store}" if store else "env://"
        with _losing_none():
            distributed.init_process_group(
                "gloo", init_method=meeting, rank=ranks.rank, world_size=ranks.world, timeout=LONGEST
            )
    try:
        yield ranks
    finally:
        if ranks.world > 1:
            with suppress(RuntimeError):
                distributed.destroy_process_group()


def of_torchrun() -> Ranks | None:
    """This process's Ranks if torchrun started it, otherwise None."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return None
    return Ranks(*(int(os.environ[name]) for name in names))


def start(run: Callable[[Ranks, Path], int], processes: int) -> int:
    """Run run(ranks, store) in this many processes of this machine; the exit code of the first that fails, or 0.

    After a failure the others get `GRACE_S` to end, then are terminated. Children ignore SIGINT; the parent forwards
    SIGTERM, so that a terminal's Ctrl-C does not interrupt their shutdown.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # hides torch's termination warnings
    interrupted = False
    with tempfile.TemporaryDirectory() as folder:
        with handled((signal.SIGINT,), signal.SIG_IGN):
            context = start_processes(
                _child, (run, processes, Path(folder, "store")), nprocs=processes, join=False, start_method="spawn"
            )
        assert context is not None
        while True:
            try:
                while not context.join(grace_period=GRACE_S):
                    pass
                return command.INTERRUPTED if interrupted else 0
            except ProcessExitedException as error:
                if error.exit_code < 0 and not interrupted:
                    name = signal.Signals(-error.exit_code).name
                    raise ProcessLostError(f"A process of this job was ended by {name}; {AGAIN}.") from error
                return command.INTERRUPTED if interrupted else error.exit_code
            except KeyboardInterrupt:
                interrupted = True
                for process in context.processes:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)


def _child(rank: int, run: Callable[[Ranks, Path], int], world: int, store: Path) -> None:
    sys.exit(command.run(lambda _: run(Ranks(rank, world, rank, world), store), ()))
