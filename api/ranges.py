"""Parts of contents: Range headers, and names for what is saved."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.responses import StreamingResponse

from tuneyard.specs.errors import InputError
from tuneyard.specs.views import ErrorBody


class BadRange(InputError):
    """This range lies outside of the content."""

    code = "bad_range"
    http_status = 416


@dataclass(frozen=True)
class Part:
    """Which bytes are wanted (first..last) and how their answer begins."""

    first: int
    last: int
    status: int
    headers: dict[str, str]


def part_of(text: str | None, total: int, *, first: int = 0) -> Part:
    """What a Range header asks of ``total`` bytes. Source: RFC 9110, 14.

    Several ranges, or what is no range of bytes, are answered with the whole, as the RFC allows.
    Raises: BadRange.
    """
    headers = {"Accept-Ranges": "bytes"}
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip()) if text else None
    if found is None or not any(found.groups()):
        return Part(first, total - 1, 200, headers | {"Content-Length": str(total - first)})
    start, end = found.groups()
    if start:
        first, last = int(start), min(int(end) if end else total - 1, total - 1)
    else:
        first, last = max(0, total - int(end)), total - 1
    if first > last:
        raise BadRange(field="Range", hint=f"it has {total} bytes")
    headers |= {
        "Content-Range": f"bytes {first}-{last}/{total}",
        "Content-Length": str(last - first + 1),
    }
    return Part(first, last, 206, headers)


def saved(content: Iterator[bytes], part: Part, *, name: str, sha256: str) -> StreamingResponse:
    """A file's part, to be saved under its name; the sha256 of the whole is its ETag."""
    headers = part.headers | {
        "ETag": f'"{sha256}"',
        "X-Checksum-Sha256": sha256,
        "Content-Disposition": disposition(name),
        # What users put in never runs as a page of ours.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
    }
    media = "application/octet-stream"
    return StreamingResponse(content, part.status, headers, media_type=media)


def disposition(name: str) -> str:
    """Content-Disposition for a name of any characters. Source: RFC 6266, 4.3."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


PARTS: dict[int | str, dict[str, Any]] = {
    206: {"description": "The part that the header Range asked for."},
    416: {"model": ErrorBody, "description": "The Range lies outside of the content."},
}
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}},
    **PARTS,
}
"""How the docs describe it."""
