"""Path prefixes: under which path of a proxy's address the API is seen."""

import re

MAX_CHARACTERS = 512

CLEAN = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~@-]+)+")
"""Segments of plain characters, none of them `.` or `..`: nothing in it needs to be escaped in a
path, a header, a cookie or a page, and it never begins with `//`, which names another host."""

OWN_PATHS = ("/api/v1/", "/v1/", "/flower/")


def clean_prefix(text: str) -> str | None:
    """The prefix without a slash at its end, empty for none; None for what is not a clean one.

    A prefix that begins our own paths (`/api`) is no clean one: nobody could tell whether a proxy
    has stripped it.
    """
    prefix = text.removesuffix("/")
    if not prefix:
        return ""
    if len(prefix) > MAX_CHARACTERS or not CLEAN.fullmatch(prefix):
        return None
    if any(own.startswith(f"{prefix}/") for own in OWN_PATHS):
        return None
    return prefix
