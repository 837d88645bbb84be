"""The store: whole folders and files under ids, below one root that workers and API share.

    ROOT/artifacts/<id>/…      folders with a manifest, visible only when whole
    ROOT/models/<id>/…         the same, for base models
    ROOT/files/<id>            uploads
    ROOT/aside/…               what is being written; swept when it grows old

Runners do not know this module: they write into WORKDIR, and their worker copies.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import UUID, uuid4

from tuneyard.specs.errors import NotFound
from tuneyard.store.folder import copy_folder, read_manifest

Shelf = Literal["artifacts", "models"]

ASIDE_AGE_S = 24 * 3600
PIECE_BYTES = 1024**2


class Store:
    """A root folder; every method takes ids, never paths from a user."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for shelf in ("artifacts", "models", "files", "aside"):
            (root / shelf).mkdir(parents=True, exist_ok=True)

    def put_folder(self, source: Path, shelf: Shelf, folder_id: UUID) -> Mapping[str, Any]:
        """Copy a whole folder in, its hashes checked on the way; returns its manifest.

        Putting the same id twice is one put: a worker that died in between does it again.
        """
        target = self.folder(shelf, folder_id)
        if not target.exists():
            copy_folder(source, target, aside=self.root / "aside" / uuid4().hex)
        return read_manifest(target)

    def folder(self, shelf: Shelf, folder_id: UUID) -> Path:
        """Where a folder stands, or will stand."""
        return self.root / shelf / folder_id.hex

    def remove_folder(self, shelf: Shelf, folder_id: UUID) -> None:
        """Remove a folder: out of sight first, then its files."""
        away = self.root / "aside" / uuid4().hex
        try:
            os.rename(self.folder(shelf, folder_id), away)
        except FileNotFoundError:
            return
        shutil.rmtree(away, ignore_errors=True)

    def put_file(self, pieces: Iterable[bytes], file_id: UUID) -> tuple[int, str]:
        """Write an upload; it is visible once whole. Returns its size in bytes and sha256."""
        aside = self.root / "aside" / uuid4().hex
        digest, size = hashlib.sha256(), 0
        try:
            with aside.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, self.file(file_id))
            _fsync(self.root / "files")
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return size, digest.hexdigest()

    def file(self, file_id: UUID) -> Path:
        """Where an upload stands."""
        return self.root / "files" / file_id.hex

    def read_file(self, file_id: UUID, *, first: int, last: int) -> Iterator[bytes]:
        """Bytes first..last of an upload, opened before it returns. Raises: NotFound."""
        try:
            file = self.file(file_id).open("rb")
        except OSError:
            raise NotFound("The bytes of this file are gone.", field="file") from None
        return _pieces(file, first, last)

    def remove_file(self, file_id: UUID) -> None:
        """Remove an upload."""
        self.file(file_id).unlink(missing_ok=True)

    def read_within(
        self, shelf: Shelf, folder_id: UUID, name: str, *, first: int, last: int
    ) -> Iterator[bytes]:
        """Bytes first..last of a file that the folder's manifest lists; opened before it returns.

        Raises: NotFound when the folder's files are gone.
        """
        try:
            file = (self.folder(shelf, folder_id) / name).open("rb")
        except OSError:
            raise NotFound("The files of this artifact are gone.") from None
        return _pieces(file, first, last)

    def sweep_aside(self, *, older_than_s: float = ASIDE_AGE_S) -> None:
        """Remove what was left half written by processes that died."""
        for path in (self.root / "aside").iterdir():
            if time.time() - path.stat().st_mtime > older_than_s:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _pieces(file: BinaryIO, first: int, last: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        left = last - first + 1
        while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
            left -= len(piece)
            yield piece


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
