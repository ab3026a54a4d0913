"""Runs a command: its exit code, and one line on stderr per warning or user error.

The commands themselves are in `cli`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from vaebm_fast.runtime.errors import UserError, sentence
from vaebm_fast.runtime.streams import standard_streams

FAILED, INTERRUPTED = 1, 130  # 128 + SIGINT, the shells' convention


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of command(arguments): its own, 130 after Ctrl-C, 1 after an error printed as `error: <sentence>`.

    Prints UserError, and OSError with a file name, that way. Any other exception is a bug and keeps its traceback.
    Work goes on without its messages if the terminal, or the program that reads them, has gone.
    """
    warnings.formatwarning = _one_line
    with standard_streams() as require_written:
        try:
            try:
                code = command(arguments)
            except SystemExit:  # --help
                require_written()
                raise
            require_written()
            return code
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
        except (UserError, OSError) as error:
            if not isinstance(error, UserError) and error.filename is None:
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            return FAILED


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
