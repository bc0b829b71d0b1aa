"""Errors that are a user's to mend: the command line shows their message, without a traceback."""


class UsageError(Exception):
    """The command, its surroundings or its data are wrong; the message says what would be right."""
