"""Errors that are the user's to mend: shown as one message, without a stack trace, with exit code 2."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Says what is wrong, where, what was got, what was expected and how to fix it."""
