"""How a command ends: its exit code, and one line on stderr for a warning or for an error that its user can mend.

The commands themselves are in `cli`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from vaebm_fast.runtime.errors import UserError, sentence

FAILED, INTERRUPTED = 1, 130  # as shells have it: 128 + SIGINT


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of command(arguments): its own, 130 after Ctrl-C, 1 after an error, told as `error: <sentence>`.

    Errors told so are UserError, and OSError where it names a file. Any other is a bug, and keeps its traceback.
    """
    warnings.formatwarning = _one_line
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads the output has had enough, as `head` does; Python's own flush on exit must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.filename is None:
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return FAILED


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"
