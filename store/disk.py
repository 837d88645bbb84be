"""The store in a folder: workers and API see one file system. Written aside, then renamed."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID, uuid4

from tuneyard.specs.errors import NotFound
from tuneyard.store.folder import MANIFEST_FILE, copy_folder, read_manifest
from tuneyard.store.shelves import (
    FORGOTTEN_S,
    OtherContent,
    Place,
    Shelf,
    Store,
    StoreUnreachable,
    check_digest,
    ids_among,
)

PIECE_BYTES = 1024**2

AWAY = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
)
"""What a file system over the network answers when its server is away."""


class DiskStore(Store):
    """A root folder with artifacts/, models/, files/, and aside/ for what is being written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("artifacts", "models", "files", "aside"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def _path(self, place: Place, an_id: UUID) -> Path:
        return self.root / place / an_id.hex

    def _aside(self) -> Path:
        return self.root / "aside" / uuid4().hex

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Around what touches the root. Raises: StoreUnreachable for one that is not mounted."""
        try:
            if not (self.root / "aside").is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
            yield
        except OSError as error:
            if error.errno in AWAY or not (self.root / "aside").is_dir():
                message = f"The store in {self.root} cannot be reached: {error.strerror}."
                raise StoreUnreachable(message) from error
            raise

    def put_folder(self, source: Path, shelf: Shelf, folder_id: UUID) -> Mapping[str, Any]:
        """Copy the folder aside and rename it; two that put it at once leave one."""
        target = self._path(shelf, folder_id)
        manifest = read_manifest(source)
        with self._reached():
            if not target.exists():
                try:
                    copy_folder(source, target, aside=self._aside())
                except OSError:
                    # Another process may have renamed its copy to this place meanwhile.
                    if not (target / MANIFEST_FILE).exists():
                        raise
            if read_manifest(target) != manifest:
                raise OtherContent()
        return manifest

    def fetch_folder(
        self, shelf: Shelf, folder_id: UUID, target: Path, *, digest: str, aside: Path
    ) -> None:
        """Copy the folder."""
        source = self._path(shelf, folder_id)
        with self._reached():
            check_digest(read_manifest(source), digest)
            copy_folder(source, target, aside=aside)

    @contextmanager
    def look_into(self, shelf: Shelf, folder_id: UUID) -> Iterator[Path]:
        """The folder itself."""
        path = self._path(shelf, folder_id)
        if not path.is_dir():
            raise FileNotFoundError(path.name)
        yield path

    def read_within(
        self, shelf: Shelf, folder_id: UUID, name: str, *, first: int, last: int
    ) -> Iterator[bytes]:
        """Read the file."""
        try:
            file = (self._path(shelf, folder_id) / name).open("rb")
        except OSError:
            raise NotFound("The files of this artifact are gone.") from None
        return _part(file, first, last)

    def remove_folder(self, shelf: Shelf, folder_id: UUID) -> None:
        """Rename it out of sight, then remove it."""
        away = self._aside()
        try:
            os.rename(self._path(shelf, folder_id), away)
        except FileNotFoundError:
            return
        shutil.rmtree(away, ignore_errors=True)

    def put_file(self, pieces: Iterable[bytes], file_id: UUID) -> tuple[int, str]:
        """Write aside, make durable, rename."""
        aside = self._aside()
        digest, size = hashlib.sha256(), 0
        try:
            with aside.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, self._path("files", file_id))
            _fsync(self.root / "files")
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return size, digest.hexdigest()

    def fetch_file(self, file_id: UUID, target: Path) -> str:
        """Copy the file, then read what was written."""
        with self._reached():
            shutil.copyfile(self._path("files", file_id), target)
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def file_here(self, file_id: UUID) -> Iterator[Path]:
        """The file itself."""
        yield self._path("files", file_id)

    def read_file(self, file_id: UUID, *, first: int, last: int) -> Iterator[bytes]:
        """Read the file."""
        try:
            file = self._path("files", file_id).open("rb")
        except OSError:
            raise NotFound("The bytes of this file are gone.", field="file") from None
        return _part(file, first, last)

    def remove_file(self, file_id: UUID) -> None:
        """Remove the file."""
        self._path("files", file_id).unlink(missing_ok=True)

    def ids(self, place: Place) -> list[UUID]:
        """What the folder holds."""
        return ids_among(os.listdir(self.root / place))

    def age_s(self, place: Place, an_id: UUID) -> float:
        """By the time of its last change; a folder changes for the last time when it is renamed."""
        try:
            return time.time() - self._path(place, an_id).stat().st_ctime
        except FileNotFoundError:
            return 0.0

    def sweep(self, *, older_than_s: float = FORGOTTEN_S) -> None:
        """Empty aside/ of what is old."""
        for path in (self.root / "aside").iterdir():
            try:
                if time.time() - path.stat().st_mtime > older_than_s:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            except FileNotFoundError:
                continue  # renamed to its place, or swept by another, at this moment


def _part(file: BinaryIO, first: int, last: int) -> Iterator[bytes]:
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
