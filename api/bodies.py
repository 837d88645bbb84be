"""Bodies of requests, read strictly and not by the web framework: see specs/documents.py."""

import re
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from tuneyard.specs.documents import read_json
from tuneyard.specs.errors import InputError

PLACE_CODES = frozenset({"malformed_json", "duplicate_key", "too_deep"})
"""Problems of JSON itself are 400, those of what it says 422."""


class BadJson(InputError):
    """The body is no JSON that can be read."""

    http_status = 400


async def raw_body(request: Request) -> bytes:
    """The body's bytes."""
    return await request.body()


def document(raw: Annotated[bytes, Depends(raw_body)]) -> dict[str, Any]:
    """The body as an object; no body is an empty one. Raises: InputError with line and hint."""
    if not raw.strip():
        return {}
    try:
        return read_json(raw)
    except InputError as error:
        if error.code not in PLACE_CODES:
            raise
        raise BadJson(
            error.message, code=error.code, field=error.field, line=error.line, hint=error.hint
        ) from None


def idempotency_key(
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="Your own name for this request: asked again with the same name and body,"
            " within a day, it answers the same job.",
        ),
    ] = None,
) -> str | None:
    """The client's own name for this submission. Raises: InputError."""
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        message = "An Idempotency-Key has 1 to 255 printable ASCII characters."
        raise InputError(message, code="out_of_range", field="Idempotency-Key")
    return key


Document = Annotated[dict[str, Any], Depends(document)]
IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]
