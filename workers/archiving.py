"""Turning the log of an ended attempt into one compressed artifact."""

import gzip
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from tuneyard.models import archives
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.engine import Database
from tuneyard.specs.ids import show_id
from tuneyard.store.folder import publish_folder
from tuneyard.store.scratch import Scratch
from tuneyard.store.shelves import Store
from tuneyard.workers.publishing import store_folder

log = logging.getLogger(__name__)

MEMBER_BYTES = 1024**2
OTHERS_AFTER_S = 600.0
"""A log whose node is gone is any worker's after so long."""


@dataclass
class LogArchiver:
    """Archives what its node ran, and what others left."""

    db: Database
    store: Store
    node_id: UUID
    scratch: Scratch

    def archive(self, *, others_after_s: float = OTHERS_AFTER_S) -> None:
        """Archive all logs that wait for it. Raises: Unavailable, OSError."""
        with self.db.begin() as tx:
            ended = archives.logs_to_archive(tx, self.node_id, others_after_s=others_after_s)
        for ref in ended:
            self._archive(ref)

    def _archive(self, ref: AttemptRef) -> None:
        with self.scratch.folder() as scratch:
            (scratch / "aside").mkdir()
            path = scratch / "aside" / archives.LOG_NAME
            members = list(_write_members(self._chunks(ref.id), path))
            if not members:
                return
            meta = {"kind": "log", "attempt": ref.number, "members": members}
            publish_folder(scratch / "aside", scratch / "log", meta)
            folder = store_folder(self.store, ref, scratch / "log", kind="log")
        with self.db.begin() as tx:
            if archives.record_log(tx, ref, folder):
                fields = {"event": "log_archived", "attempt": show_id("attempt", ref.id)}
                log.debug("log archived", extra=fields | {"bytes": folder.bytes})

    def _chunks(self, attempt_id: UUID) -> Iterator[tuple[int, bytes]]:
        last = 0
        while True:
            with self.db.begin() as tx:
                chunks = archives.next_chunks(tx, attempt_id, after=last)
            if not chunks:
                return
            yield from ((start, data) for _, start, data in chunks)
            last = chunks[-1][0]


def _write_members(chunks: Iterable[tuple[int, bytes]], path: Path) -> Iterator[list[int]]:
    """Write a gzip file whose members can be read one by one; yields what the manifest lists."""
    at = 0
    with path.open("wb") as file:
        for start, data in _joined(chunks):
            packed = gzip.compress(data, mtime=0)
            file.write(packed)
            yield [start, len(data), at, len(packed)]
            at += len(packed)


def _joined(chunks: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Chunks that follow on one another, joined to about a mebibyte; a gap stays a gap."""
    begin, held = 0, bytearray()
    for start, data in chunks:
        if held and (start != begin + len(held) or len(held) >= MEMBER_BYTES):
            yield begin, bytes(held)
            held.clear()
        if not held:
            begin = start
        held += data
    if held:
        yield begin, bytes(held)
