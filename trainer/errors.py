"""What the user can mend, and what is told of an error.

A UserError is printed as one line, without a traceback, and the exit status is 2.
"""


class UserError(ValueError):
    """A wrong option, file or folder.  The message names it and says what to do."""


def reason(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
