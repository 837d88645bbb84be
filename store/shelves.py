"""What every store promises, wherever it lies: whole folders and files under ids.

    ROOT/artifacts/<id>/…      folders with a manifest, visible only when whole
    ROOT/models/<id>/…         the same, for base models
    ROOT/files/<id>            uploads

Ids, never paths from a user. What was put under an id never changes, so putting it again, from
another process too, is one put. Nothing here is known of teams: who may read what is in the rows.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from tuneyard.specs.errors import TuneyardError, Unavailable
from tuneyard.store.folder import MANIFEST_FILE, FolderDamaged, manifest_digest

Shelf = Literal["artifacts", "models"]
Place = Literal["artifacts", "models", "files"]

FORGOTTEN_S = 24 * 3600.0
"""What is half written and has not grown for so long was left by a process that died."""


_ID = re.compile(r"[0-9a-f]{32}")


class StoreUnreachable(Unavailable):
    """The store does not answer; nothing is lost by asking again."""

    code = "store_unreachable"


class OtherContent(TuneyardError):
    """There is something else under this id already."""

    code = "folder_taken"


class Store(ABC):
    """Every method may raise StoreUnreachable; OSError is this machine's own trouble."""

    @abstractmethod
    def put_folder(self, source: Path, shelf: Shelf, folder_id: UUID) -> Mapping[str, Any]:
        """Copy a whole folder in, its hashes checked on the way; returns its manifest.

        Raises: FileNotFoundError (the source went away), FolderDamaged (it is not as its manifest
        says), OtherContent.
        """

    @abstractmethod
    def fetch_folder(
        self, shelf: Shelf, folder_id: UUID, target: Path, *, digest: str, aside: Path
    ) -> None:
        """Copy a folder out to ``target``, by way of ``aside`` on the same disk, hashes checked.

        digest: of its manifest, as it was recorded.
        Raises: FileNotFoundError (no such folder), FolderDamaged.
        """

    @abstractmethod
    def look_into(self, shelf: Shelf, folder_id: UUID) -> AbstractContextManager[Path]:
        """A local folder to look into for a moment: names, sizes, small files, headers of weights.

        Raises: FileNotFoundError (no such folder), FolderDamaged.
        """

    @abstractmethod
    def read_within(
        self, shelf: Shelf, folder_id: UUID, name: str, *, first: int, last: int
    ) -> Iterator[bytes]:
        """Bytes first..last of a file that the folder's manifest lists; opened before it returns.

        Raises: NotFound when the folder's files are gone.
        """

    @abstractmethod
    def remove_folder(self, shelf: Shelf, folder_id: UUID) -> None:
        """Remove a folder: out of sight first, then its files. One that is not there is fine."""

    @abstractmethod
    def put_file(self, pieces: Iterable[bytes], file_id: UUID) -> tuple[int, str]:
        """Write a file as it comes; it is visible once whole. Returns its size and sha256.

        What ``pieces`` raises is passed on, and nothing of the file is left.
        """

    @abstractmethod
    def fetch_file(self, file_id: UUID, target: Path) -> str:
        """Copy a file out; returns the sha256 of what came. Raises: FileNotFoundError."""

    @abstractmethod
    def file_here(self, file_id: UUID) -> AbstractContextManager[Path]:
        """A file as a path on this machine, for as long as the block lasts.

        Where the file is gone, nothing is at that path.
        """

    @abstractmethod
    def read_file(self, file_id: UUID, *, first: int, last: int) -> Iterator[bytes]:
        """Bytes first..last of a file, opened before it returns. Raises: NotFound."""

    @abstractmethod
    def remove_file(self, file_id: UUID) -> None:
        """Remove a file. One that is not there is fine."""

    @abstractmethod
    def ids(self, place: Place) -> list[UUID]:
        """All that lies in a place, whole or half written."""

    @abstractmethod
    def age_s(self, place: Place, an_id: UUID) -> float:
        """Seconds since something of it was written; 0 where that is not known."""

    @abstractmethod
    def sweep(self, *, older_than_s: float = FORGOTTEN_S) -> None:
        """Remove half written things that have no id yet: folders aside, multipart uploads."""


def begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same pieces, the first of them read already: what is gone or away is known at once."""
    first = next(pieces, b"")
    return chain([first], pieces)


def check_digest(manifest: Mapping[str, Any], digest: str) -> None:
    """Raises: FolderDamaged when this is not the manifest that was recorded."""
    if manifest_digest(manifest) != digest:
        raise FolderDamaged("manifest.json has changed.", path=MANIFEST_FILE)


def ids_among(names: Iterable[str]) -> list[UUID]:
    """The ids among some names; what others put there is not ours to touch."""
    return [UUID(hex=name) for name in names if _ID.fullmatch(name)]
