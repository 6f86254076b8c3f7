"""The one exception that the command line prints without a traceback."""


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints the message alone and exits with code 2.
    """
