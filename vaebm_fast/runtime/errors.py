"""Errors that are the user's to mend, and the one line that tells of them."""

from __future__ import annotations

AGAIN = "run the same command again to continue"


class UserError(ValueError):
    """What the user can mend: an argument, a file, a missing part. The message is one sentence for the user."""


def sentence(error: BaseException) -> str:
    """The error's message on one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split())
