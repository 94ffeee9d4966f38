"""The two kinds of failure that end a command with one line instead of a traceback."""


class UserError(Exception):
    """Something a user can cause: the input or the configuration is wrong. Printed as one line, exit code 2."""


class RunError(Exception):
    """Something that failed while running, with sound input. Printed as one line, exit code 1."""
