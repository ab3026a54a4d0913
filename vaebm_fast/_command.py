"""What all commands share: the meaning of --device; and how they end: the exit code, and one line on stderr for a
warning, or an error that its user can act on.

What the commands are is left to `cli` and `train.py`.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch

DeviceName = Literal["auto", "cpu", "cuda"]
FAILED, INTERRUPTED = 1, 130  # as shells have it: 128 + SIGINT


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of command(arguments): its own, 130 after Ctrl-C, 1 after an error, told as `error: <sentence>`.

    Errors told so are ValueError, OSError, FloatingPointError, and a RuntimeError that this package raised itself. Any
    other is a bug, and keeps its traceback.
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
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_ours(error):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return FAILED


def choose_device(name: str) -> torch.device:
    """The device that --device means. Raises ValueError where it asks for a GPU and torch finds none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; `vaebm-fast info` says what is missing.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def _is_ours(error: BaseException) -> bool:
    """Whether the package raised it: torch raises RuntimeError too, for what can only be a bug here."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).split(".")[0] == "vaebm_fast"


def sentence(error: Exception) -> str:
    """The error's message on one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split())
