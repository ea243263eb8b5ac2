"""Errors that are the user's to mend: shown as one message, without a stack trace, with exit code 2."""

__all__ = ["Diverged", "OwnError", "UserError"]


class UserError(ValueError):
    """Says what is wrong, where, what was got, what was expected and how to fix it."""


class Diverged(UserError):
    """The loss or the gradient was not finite for too many steps in a row."""


class OwnError(UserError):
    """Happened to this rank alone, as when its memory ran out: this rank must say it, whichever it is."""
