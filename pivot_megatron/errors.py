"""The kinds of failure that end a command with one line instead of a traceback, and its exit code."""


class UserError(Exception):
    """Something a user can cause: the input or the configuration is wrong."""

    exit_code = 2


class RunError(Exception):
    """Something that failed while running, with sound input."""

    exit_code = 1


class RuleError(RunError):
    """A run that one of its own rules ended. From the same checkpoint the same command would end the same way."""

    exit_code = 3


def in_a_line(error: Exception) -> str:
    """What a library's error says, cut to what a message of one line can quote."""
    return " ".join(str(error).split())[:200] or type(error).__name__
