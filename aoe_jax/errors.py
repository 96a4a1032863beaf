"""The one exception for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: a bad value, a missing file, an unknown name.

    The message names the field or file, its value and what would be right. The command line prints it on stderr and ends
    with exit status 2; no traceback is shown unless `--debug` is given.
    """
