"""Cursors: opaque to clients, checked when they come back."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from tuneyard.specs.errors import InputError


def read_cursor(cursor: str | None) -> UUID | None:
    """Where a page goes on. Raises: InputError bad_cursor."""
    if cursor is None:
        return None
    try:
        return UUID(bytes=base64.urlsafe_b64decode(cursor + "=="))
    except (binascii.Error, ValueError):
        message = "This cursor is not one of ours."
        raise InputError(message, code="bad_cursor", field="cursor") from None


def page(rows: Sequence[Any], limit: int) -> tuple[list[Any], str | None]:
    """At most ``limit`` of the rows, and a cursor where there were more."""
    shown = list(rows[:limit])
    if len(rows) <= limit:
        return shown, None
    last = UUID(hex=shown[-1].id.partition("_")[2])
    return shown, base64.urlsafe_b64encode(last.bytes).decode().rstrip("=")
