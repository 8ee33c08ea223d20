"""The one error a user sees."""


class UserError(Exception):
    """Something a user can cause and can mend: one line that names what, the value, what is allowed, and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
