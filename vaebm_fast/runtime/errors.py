"""Errors that the user can fix, and their one-line form."""

from __future__ import annotations

AGAIN = "run the same command again to continue"


class UserError(ValueError):
    """An error that the user can fix: an argument, a file, a missing part. The message is one sentence for the user.

    Commands print it as one line. Any other exception, except an OSError that names its file, is a bug and keeps its
    traceback. So checks of user input raise UserError; checks of internal callers raise builtin types.
    """


class NonFiniteError(UserError, FloatingPointError):
    """Weights, a loss, a statistic or a chain is not finite."""


def sentence(error: BaseException) -> str:
    """The error's message on one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}."
    return " ".join(str(error).split())
