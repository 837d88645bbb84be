"""Small texts that a person points at: a file, a pipe, or ``-`` for stdin."""

import sys
from pathlib import Path
from typing import BinaryIO

from tuneyard.specs.errors import InputError

MAX_BYTES = 2 * 1024**2


def read_small(name: str, *, hint: str) -> bytes:
    """What a file or stdin holds, at most 2 MiB. Raises: InputError that names it.

    It is read before it is measured: devices and pipes have no size.
    """
    shown = "stdin" if name == "-" else name
    try:
        if name == "-":
            content = _stdin().read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise unreadable(shown, error) from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{shown} is larger than 2 MiB.", code="too_large", hint=hint)
    if not content.strip():
        raise InputError(f"{shown} is empty.", code="empty_file")
    return content


def unreadable(name: object, error: Exception) -> InputError:
    """Why a file cannot be read."""
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{name} cannot be read: {reason}.", code="no_file")


def unwritable(name: object, error: OSError) -> InputError:
    """Why a file cannot be written."""
    where = error.filename or name
    return InputError(f"{where} cannot be written: {error.strerror}.", code="not_writable")


def _stdin() -> BinaryIO:
    # A process may be started without any stdin: Python then has None there.
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("`-` reads stdin, and nothing is piped in.", code="no_input")
    return sys.stdin.buffer
