"""What can go wrong, in the words the user reads."""

from __future__ import annotations


class RopeExportError(Exception):
    """Base of every error this package raises on purpose."""


class BadInputError(RopeExportError, ValueError):
    """An argument, option or file is not acceptable.

    The message is one line: what it is, the value got, and what would be accepted.
    """


class ExportError(RopeExportError):
    """The exported graph does not keep a promise (an axis lost its range, say)."""


class ProviderUnavailableError(RopeExportError):
    """An execution provider that was asked for cannot be used on this machine."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:400]
