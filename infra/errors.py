"""The base of every error that a person can mend."""


class ExpectedError(Exception):
    """Shown without a traceback: its message is a sentence with the field, the rule, the value found and the remedy."""
