"""The ways in which a command can fail; `cli` prints the message on stderr and exits with the code."""


class UserError(Exception):
    """The user's input or params are wrong; the message names the key or file, the value and the remedy."""

    exit_code = 2


class DataError(Exception):
    """The data failed validation; the message is a table of the failed checks."""

    exit_code = 3


class GateError(Exception):
    """The gate does not let an encoder into production; the message names each failed check, its figure and bound."""

    exit_code = 4


class Interrupted(Exception):
    """A signal stopped the command after a checkpoint, or another process holds a lock; run again to go on."""

    exit_code = 75
