"""The one exception that means: a person can mend this."""


class UsageError(ValueError):
    """A mistake in what was asked for; the message names it, its value, the rule and the way out.

    The command line prints the message alone, without a traceback.
    """
