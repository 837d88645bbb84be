"""Small texts that a person points at: a file, a pipe, or ``-`` for stdin."""

import os
import stat
import sys
from typing import BinaryIO

from tuneyard.specs.errors import InputError

MAX_BYTES = 2 * 1024**2


def read_small(name: str, *, hint: str) -> bytes:
    """What a file or stdin holds, at most 2 MiB. Raises: InputError that names it.

    It is read before it is measured: devices and pipes have no size.
    """
    if not name:
        message = "The file's name is empty."
        raise InputError(message, code="no_file", hint="name a file, or - for stdin")
    shown = "stdin" if name == "-" else name
    piped = False
    try:
        if name == "-":
            content = _stdin().read(MAX_BYTES + 1)
        else:
            with open(name, "rb", opener=_open_at_once) as file:
                piped = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
                content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise unreadable(shown, error) from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{shown} is larger than 2 MiB.", code="too_large", hint=hint)
    if not content.strip():
        what = "is a pipe into which nobody writes" if piped and not content else "is empty"
        raise InputError(f"{shown} {what}.", code="empty_file")
    return content


def _open_at_once(name: str, flags: int) -> int:
    """Opening a named pipe waits for its writer, for ever where there is none; reading waits too,
    but only while there is one."""
    opened = os.open(name, flags | os.O_NONBLOCK)
    os.set_blocking(opened, True)
    return opened


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
