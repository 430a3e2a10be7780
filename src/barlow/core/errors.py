"""The ways a command can end other than well; `cli` turns each into its exit code and one line on stderr."""


class UserError(Exception):
    """The user's input or params are wrong; the message names the key or file, the value and the remedy."""

    exit_code = 2


class DataError(Exception):
    """The data failed validation; the message is the table of what failed."""

    exit_code = 3


class GateError(Exception):
    """The gate does not let an encoder into production; the message names each failed check, its figure and bound."""

    exit_code = 4


class Interrupted(Exception):
    """Stopped by a signal after a checkpoint was written, or in the way of another process; run again to go on."""

    exit_code = 75
