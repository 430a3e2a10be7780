"""The ways a command can end other than well; `cli` turns each into its exit code and one line on stderr."""


class UserError(Exception):
    """The user's input or params are wrong; the message names the key or file, the value and the remedy."""

    exit_code = 2


class DataError(Exception):
    """The data failed validation; the message is the table of what failed."""

    exit_code = 3


class Interrupted(Exception):
    """Stopped by a signal after a checkpoint was written; the same command run again continues."""

    exit_code = 75
