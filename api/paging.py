"""Pages and their parameters: cursors, opaque and bound to their listing; unknown names refused."""

import base64
import binascii
import difflib
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query, Request
from fastapi.routing import APIRoute

from tuneyard.specs.errors import InputError

SEAL_BYTES = 8

Cursor = Annotated[
    str | None,
    Query(description="next_cursor of the page before.", json_schema_extra={"minLength": 1}),
]


def read_cursor(cursor: str | None, *listing: object) -> UUID | None:
    """Where a page goes on. Raises: InputError bad_cursor, also for another listing's cursor."""
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor + "==", altchars=b"-_", validate=True)
        last = UUID(bytes=raw[:16])
    except (binascii.Error, ValueError):
        raise _bad_cursor() from None
    if raw[16:] != _seal(last, listing):
        raise _bad_cursor()
    return last


def page(rows: Sequence[Any], limit: int, *listing: object) -> tuple[list[Any], str | None]:
    """At most ``limit`` of the rows, and a cursor where there were more."""
    shown = list(rows[:limit])
    if len(rows) <= limit:
        return shown, None
    last = UUID(hex=shown[-1].id.partition("_")[2])
    raw = last.bytes + _seal(last, listing)
    return shown, base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _seal(last: UUID, listing: Sequence[object]) -> bytes:
    """What ties a cursor to its team and filters. No secret: row level security guards the rows."""
    return hashlib.sha256(repr((last.hex, listing)).encode()).digest()[:SEAL_BYTES]


def _bad_cursor() -> InputError:
    hint = "pass `next_cursor` of the page before, with the same filters"
    message = "This cursor is not of this listing."
    return InputError(message, code="bad_cursor", field="cursor", hint=hint)


async def refuse_unknown_names(request: Request) -> None:
    """Refuse parameters that the route does not have: a misspelt filter must not show it all."""
    route = request.scope["route"]
    if not isinstance(route, APIRoute):
        return
    known = [field.alias for field in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            message = f"There is no parameter {name[:60]!r}."
            raise InputError(message, code="unknown_field", field=name[:60], hint=hint)
