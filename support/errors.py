"""Errors that the user can correct: each has a message of one sentence.

No reader of the method needs this file: `launch` prints the sentence and leaves out the traceback.
"""

import contextlib
import textwrap
from typing import Iterator


class UserError(Exception):
    """A mistake of the person at the keyboard, or of their disk. The message says what is wrong and what to do."""


@contextlib.contextmanager
def explained(what: str, advice: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of a library into a UserError: "WHAT (the library's reason): ADVICE"."""
    try:
        yield
    except errors as error:
        reason = textwrap.shorten(getattr(error, "strerror", None) or one_line(error), 400)
        raise UserError(f"{what} ({reason}): {advice}") from error


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
