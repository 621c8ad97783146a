"""Errors that the user can fix, and how an error is reported.

A UserError is printed as one line, without a traceback, and the exit status is 2.
"""


class UserError(ValueError):
    """A wrong option, file or folder.  The message names it and says what to do."""


def reason(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
