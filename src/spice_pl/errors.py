"""The exception for mistakes that the user can correct."""


class UsageError(ValueError):
    """A mistake that the user can correct.

    The message names what is wrong, its value, the rule and the way out. The command line prints
    the message alone, without a traceback.
    """
