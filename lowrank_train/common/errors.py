"""Errors that the user can fix: each is shown as one message, without a stack trace, with exit code 2."""

__all__ = ["Diverged", "OwnError", "UserError", "first_line", "last_line", "type_and_line"]


class UserError(ValueError):
    """Says what is wrong, where, what was got, what was expected and how to fix it."""


class Diverged(UserError):
    """The loss or the gradient was not finite for too many steps in a row, or a number to be saved is not finite."""


class OwnError(UserError):
    """An error of this rank alone, such as memory that ran out; this rank prints the message, whichever it is."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error of another library, or the name of its type if it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """Return the last line; in errors of transformers it says what is wrong with which field."""
    return _lines(error)[-1].strip()


def type_and_line(error: BaseException) -> str:
    """Return the type of an error of another library and its first line, of which 300 characters are kept."""
    return f"{type(error).__name__}: {first_line(error)[:300]}"


def _lines(error: BaseException) -> list[str]:
    return str(error).splitlines() or [type(error).__name__]
