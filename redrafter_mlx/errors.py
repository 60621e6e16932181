"""The exception a user is meant to read."""


class UserError(ValueError):
    """The user's input cannot be used.

    Its message is one line: what was wrong, where, and the way out. The commands print it and
    exit with code 2.
    """
