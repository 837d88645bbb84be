"""The store in an object store: a folder is there once its manifest is, which is written last.

Uploads and downloads hold a few blocks at a time, never a file. A folder whose upload broke off
goes on with the files that are missing: what lies under an id never has another content.
"""

import hashlib
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from tuneyard.specs.errors import NotFound
from tuneyard.store.bucket import Bucket
from tuneyard.store.folder import (
    MANIFEST_FILE,
    assemble_folder,
    checked,
    file_pieces,
    manifest_bytes,
    parse_manifest,
    read_manifest,
)
from tuneyard.store.scratch import Scratch
from tuneyard.store.shelves import (
    FORGOTTEN_S,
    OtherContent,
    Place,
    Shelf,
    Store,
    StoreUnreachable,
    begun,
    check_digest,
    ids_among,
)

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 * 1024**2
MAX_BLOCKS = 9_000
"""S3 takes 10,000 parts of a file."""

UPLOADS_AT_ONCE = 4
READ_BYTES = 2 * 1024**2
READ_AHEAD = 8
SMALL_BYTES = 32 * 1024**2


class ObjectStore(Store):
    """A bucket, and scratch space for what has to be a path on this machine."""

    def __init__(self, bucket: Bucket, scratch: Scratch, *, max_file_bytes: int) -> None:
        self._bucket, self._scratch = bucket, scratch
        self._max_file_bytes = max_file_bytes
        self._readers = ThreadPoolExecutor(8, thread_name_prefix="store-read")

    # Folders --------------------------------------------------------------------------------------

    def put_folder(self, source: Path, shelf: Shelf, folder_id: UUID) -> Mapping[str, Any]:
        """Upload the files that are not there yet, compare all sizes, write the manifest."""
        manifest = read_manifest(source)
        root = f"{shelf}/{folder_id.hex}"
        there = self._bucket.entries(root)
        if MANIFEST_FILE in there:
            if self._manifest(root) != manifest:
                raise OtherContent()
            return manifest
        sizes = {entry["path"]: entry["size"] for entry in manifest["files"]}
        missing = [e for e in manifest["files"] if _size(there, e["path"]) != e["size"]]
        with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="store-write") as pool:
            list(pool.map(lambda entry: self._upload(source, root, entry), missing))
        there = self._bucket.entries(root)
        wrong = [name for name, size in sizes.items() if _size(there, name) != size]
        if wrong:
            raise StoreUnreachable(f"The store lost {wrong[0]} while it was being written.")
        self._bucket.write(f"{root}/{MANIFEST_FILE}", manifest_bytes(manifest))
        return manifest

    def _upload(self, source: Path, root: str, entry: Mapping[str, Any]) -> None:
        key, block = f"{root}/{entry['path']}", _block_bytes(entry["size"])
        with self._bucket.writing(key, block_bytes=block) as upload:
            for piece in checked(file_pieces(source / entry["path"]), entry):
                upload.write(piece)

    def _manifest(self, root: str) -> dict[str, Any]:
        return parse_manifest(self._bucket.read_whole(f"{root}/{MANIFEST_FILE}"))

    def fetch_folder(
        self, shelf: Shelf, folder_id: UUID, target: Path, *, digest: str, aside: Path
    ) -> None:
        """Download the files that the manifest lists, reading ahead."""
        root = f"{shelf}/{folder_id.hex}"
        manifest = self._manifest(root)
        check_digest(manifest, digest)
        sizes = {entry["path"]: entry["size"] for entry in manifest["files"]}

        def pieces_of(name: str) -> Iterator[bytes]:
            return self._ahead(f"{root}/{name}", sizes[name])

        assemble_folder(manifest, pieces_of, target, aside=aside)

    @contextmanager
    def look_into(self, shelf: Shelf, folder_id: UUID) -> Iterator[Path]:
        """The folder with holes: small files whole, of larger ones the header and the length."""
        root = f"{shelf}/{folder_id.hex}"
        manifest = self._manifest(root)
        with self._scratch.folder() as folder:
            for entry in manifest["files"]:
                path = folder / entry["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._head(f"{root}/{entry['path']}", entry["size"]))
                os.truncate(path, entry["size"])
            yield folder

    def _head(self, key: str, size: int) -> bytes:
        if size <= SMALL_BYTES and not key.endswith(".safetensors"):
            return self._bucket.read(key, 0, size - 1) if size else b""
        head = self._bucket.read(key, 0, min(size, READ_BYTES) - 1) if size else b""
        # The first eight bytes of weights say how long their header is.
        length = 8 + struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        if key.endswith(".safetensors") and len(head) < length <= min(size, 4 * SMALL_BYTES):
            head += self._bucket.read(key, len(head), length - 1)
        return head

    def read_within(
        self, shelf: Shelf, folder_id: UUID, name: str, *, first: int, last: int
    ) -> Iterator[bytes]:
        """Read by ranges."""
        try:
            return begun(self._pieces(f"{shelf}/{folder_id.hex}/{name}", first, last))
        except FileNotFoundError:
            raise NotFound("The files of this artifact are gone.") from None

    def remove_folder(self, shelf: Shelf, folder_id: UUID) -> None:
        """The manifest first, then the rest; it is asked whether all are gone."""
        root = f"{shelf}/{folder_id.hex}"
        self._bucket.remove([f"{root}/{MANIFEST_FILE}"])
        self._bucket.remove([f"{root}/{name}" for name in self._bucket.entries(root)])
        if self._bucket.entries(root):
            raise StoreUnreachable("The store did not remove what it was asked to.")

    # Files ----------------------------------------------------------------------------------------

    def put_file(self, pieces: Iterable[bytes], file_id: UUID) -> tuple[int, str]:
        """Upload as it comes, in parts when it is large."""
        digest, size = hashlib.sha256(), 0
        block = _block_bytes(self._max_file_bytes)
        with self._bucket.writing(f"files/{file_id.hex}", block_bytes=block) as upload:
            for piece in pieces:
                upload.write(piece)
                digest.update(piece)
                size += len(piece)
        return size, digest.hexdigest()

    def fetch_file(self, file_id: UUID, target: Path) -> str:
        """Download, reading ahead."""
        key = f"files/{file_id.hex}"
        digest, size = hashlib.sha256(), self._bucket.find(key).size
        with target.open("wb") as file:
            for piece in self._ahead(key, size):
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    @contextmanager
    def file_here(self, file_id: UUID) -> Iterator[Path]:
        """A copy in scratch space; a path where nothing is when the object is gone."""
        with self._scratch.folder() as folder:
            try:
                self.fetch_file(file_id, folder / "file")
            except FileNotFoundError:
                log.warning("file is gone", extra={"event": "file_gone", "file": file_id.hex})
            yield folder / "file"

    def read_file(self, file_id: UUID, *, first: int, last: int) -> Iterator[bytes]:
        """Read by ranges."""
        try:
            return begun(self._pieces(f"files/{file_id.hex}", first, last))
        except FileNotFoundError:
            raise NotFound("The bytes of this file are gone.", field="file") from None

    def remove_file(self, file_id: UUID) -> None:
        """Remove the object."""
        self._bucket.remove([f"files/{file_id.hex}"])

    # Housekeeping ---------------------------------------------------------------------------------

    def ids(self, place: Place) -> list[UUID]:
        """What a listing shows; half written folders too."""
        return ids_among(self._bucket.names(place))

    def age_s(self, place: Place, an_id: UUID) -> float:
        """By its newest object."""
        key = f"{place}/{an_id.hex}"
        try:
            found = self._bucket.entries(key).values() or [self._bucket.find(key)]
        except FileNotFoundError:
            return 0.0
        # What has no time is young: it is left alone.
        return max(0.0, min(time.time() - (each.written_at or time.time()) for each in found))

    def sweep(self, *, older_than_s: float = FORGOTTEN_S) -> None:
        """End multipart uploads that nobody goes on with."""
        self._bucket.abort_uploads(older_than_s=older_than_s)

    # Reading --------------------------------------------------------------------------------------

    def _pieces(self, key: str, first: int, last: int) -> Iterator[bytes]:
        """One range after the other: a reader that is slow holds one of them."""
        for begin in range(first, last + 1, READ_BYTES):
            yield self._bucket.read(key, begin, min(begin + READ_BYTES - 1, last))

    def _ahead(self, key: str, size: int) -> Iterator[bytes]:
        """All of an object in order, with the next ranges on their way."""
        coming: deque[Future[bytes]] = deque()
        for begin in range(0, size, READ_BYTES):
            end = min(begin + READ_BYTES, size) - 1
            coming.append(self._readers.submit(self._bucket.read, key, begin, end))
            if len(coming) > READ_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _size(there: Mapping[str, Any], name: str) -> int | None:
    return there[name].size if name in there else None


def _block_bytes(size: int) -> int:
    return max(BLOCK_BYTES, -(-size // MAX_BLOCKS))
