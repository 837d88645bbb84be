"""Identifiers: UUIDv7, shown as a prefix and 32 lower-case hexadecimal digits.

The database holds plain uuids. Text such as ``job_019ab…`` exists at the edges only, and nothing
but the exact form is accepted there.
"""

import os
import re
import time
from uuid import UUID

from tuneyard.specs.errors import BadId

PREFIXES = {
    "api_key": "key",
    "artifact": "artifact",
    "attempt": "attempt",
    "base_model": "base",
    "device": "device",
    "file": "file",
    "job": "job",
    "model": "model",
    "node": "node",
    "pipeline": "pipe",
    "slot": "slot",
    "team": "team",
}
"""Kind of thing -> prefix of its ids."""

_HEX = re.compile(r"[0-9a-f]{32}")


def new_id() -> UUID:
    """Make a UUIDv7: 48 bits of Unix milliseconds, then random bits. Source: RFC 9562, 5.7."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    high = (milliseconds & (1 << 48) - 1) << 80
    version_and_a = (0x7 << 76) | ((random >> 64) & 0xFFF) << 64
    variant_and_b = (0b10 << 62) | (random & (1 << 62) - 1)
    return UUID(int=high | version_and_a | variant_and_b)


def show_id(kind: str, value: UUID) -> str:
    """Write an id as its readers know it: ``job_`` + 32 hexadecimal digits."""
    return f"{PREFIXES[kind]}_{value.hex}"


def parse_id(kind: str, text: str) -> UUID:
    """Read an id back. Raises: BadId when it is not exactly one of this kind."""
    prefix, _, digits = text.partition("_")
    if prefix != PREFIXES[kind] or not _HEX.fullmatch(digits):
        raise BadId(
            f"{text[:60]!r} is not the id of a {kind.replace('_', ' ')}.",
            hint=f"ids look like {PREFIXES[kind]}_ and 32 lower-case hexadecimal digits",
        )
    return UUID(hex=digits)


def is_id(kind: str, text: str) -> bool:
    """Whether a text has the exact form of an id of this kind."""
    prefix, _, digits = text.partition("_")
    return prefix == PREFIXES[kind] and _HEX.fullmatch(digits) is not None
