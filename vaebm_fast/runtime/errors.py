"""Errors that are the user's to mend, and the one line that tells of them."""

from __future__ import annotations

AGAIN = "run the same command again to continue"


class UserError(ValueError):
    """What the user can mend: an argument, a file, a missing part. The message is one sentence for the user.

    Commands print it as one line. Any other exception but an OSError that names its file is a bug and keeps its
    traceback: so code of this package that checks what a user gives raises UserError, and code that checks its own
    callers raises the builtin types.
    """


class NonFiniteError(UserError, FloatingPointError):
    """Weights, a loss, a statistic or a chain that is infinite or not a number."""


def sentence(error: BaseException) -> str:
    """The error's message on one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}."
    return " ".join(str(error).split())
