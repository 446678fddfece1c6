"""The base of every error that a person can mend."""


class ExpectedError(Exception):
    """Shown without a traceback: its message is a sentence with the field, the rule, the value found and the remedy."""


class NotOurs(ExpectedError):
    """On a server that others use something bears a name of ours without our mark; it was left as it is."""


def stopped_by(error: BaseException | None) -> BaseException | None:
    """The signal or Ctrl-C that an error came of, None where it came of none: a signal may land anywhere, and whatever
    it interrupts may answer with an error of its own."""
    while isinstance(error, Exception):
        error = error.__cause__ or error.__context__
    return error
