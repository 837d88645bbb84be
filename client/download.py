"""Files that come from the server: checked by their sha256, and visible only when whole."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from tuneyard.client.connection import Connection
from tuneyard.client.errors import Refused, Unreachable

TRIES = 3


def fetch(connection: Connection, url: str, path: Path, *, sha256: str) -> None:
    """Download to ``path``, unless the same bytes lie there. Raises: OSError, Unreachable."""
    if path.is_file() and file_sha256(path) == sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for tries_left in reversed(range(TRIES)):
        try:
            _fetch_once(connection, url, path, sha256)
        except Unreachable:
            if not tries_left:
                raise
        else:
            return


def _fetch_once(connection: Connection, url: str, path: Path, sha256: str) -> None:
    aside = path.with_name(f".{path.name[:200]}.{uuid4().hex}")
    digest = hashlib.sha256()
    try:
        with connection.stream(url) as answer, aside.open("wb") as file:
            for piece in answer.iter_bytes():
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            message = f"{path.name} did not arrive as it left: its sha256 is another."
            raise Unreachable(message, code="checksum_mismatch", hint="try again")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def inside(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Where a listed file goes. Raises: Refused for a path that would leave the folder."""
    name = PurePosixPath(entry["path"])
    if name.is_absolute() or ".." in name.parts or "\0" in str(name) or not name.parts:
        message = f"The server lists {str(name)[:100]!r}, which would lie outside of {folder}."
        raise Refused(0, {"code": "path_not_allowed", "message": message})
    return folder.joinpath(*name.parts)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
