"""What the user can mend: an error of this kind is printed as one line, without a traceback, and
the exit status is 2."""


class UserError(ValueError):
    """A wrong option, file or folder.  The message names it and says what to do."""
