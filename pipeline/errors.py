"""The errors that users are meant to read."""


class GmpipeError(Exception):
    """Something the user can mend.

    The message names the thing (file, row, image id, key), what was found and what was expected,
    and ends with the next step. The command line prints it without a traceback.
    """


class Stopped(GmpipeError):
    """The user stopped it (Ctrl-C). The message says what stays, and how to go on."""
