"""Reading logs for an answer: chunks from the database, ended attempts' from the store."""

import gzip
from collections.abc import Iterator, Sequence
from uuid import UUID

from sqlalchemy import Connection

from tuneyard.models import archives, logs, reading
from tuneyard.models.archives import LogArchive, Member
from tuneyard.models.engine import Database
from tuneyard.models.logs import LogPosition, Part, Piece
from tuneyard.store.shelves import Store

PIECES_AT_ONCE = 64


class LogReader:
    """The logs of one team, read for one answer; it keeps the member that it read last."""

    def __init__(self, db: Database, store: Store, team: UUID) -> None:
        self._db, self._store, self._team = db, store, team
        self._archives: dict[UUID, LogArchive] = {}
        self._last: tuple[UUID, Member, bytes] | None = None

    def content(self, parts: Sequence[Part]) -> Iterator[bytes]:
        """The bytes of all parts, about a mebibyte in memory at a time."""
        for batch in logs.batches(parts):
            data = self.read([part.piece for part in batch])
            yield b"".join(
                each[part.begin : part.end] for each, part in zip(data, batch, strict=True)
            )

    def after(
        self, job_id: UUID, attempt: int | None, position: LogPosition
    ) -> tuple[reading.Standing, list[bytes], LogPosition]:
        """What came after a position, or some of it, and how the job stood before it was looked at.

        A job that had ended by then has no more log to come.
        """
        with self._db.begin(team=self._team) as tx:
            standing = reading.standing(tx, job_id)
            pieces, end = logs.lay_out(
                tx,
                job_id,
                attempt=attempt,
                after=position,
                limit=PIECES_AT_ONCE,
                bytes_at_most=logs.BATCH_BYTES,
            )
        return standing, self.read(pieces), end

    def read(self, pieces: Sequence[Piece]) -> list[bytes]:
        """The bytes of each piece; of one that was cut out meanwhile, as many blanks.

        Raises: Unavailable, StoreUnreachable.
        """
        with self._db.begin(team=self._team) as tx:
            chunks = logs.read_chunks(tx, pieces)
            for piece in pieces:
                # A chunk that is gone was archived since the pieces were laid out.
                if (piece.attempt_id, piece.seq) not in chunks:
                    self._find_archive(tx, piece.attempt_id)
        return [self._bytes_of(piece, chunks) for piece in pieces]

    def _find_archive(self, tx: Connection, attempt_id: UUID | None) -> None:
        if attempt_id is not None and attempt_id not in self._archives:
            found = archives.archive_of(tx, attempt_id)
            if found is not None:
                self._archives[attempt_id] = found

    def _bytes_of(self, piece: Piece, chunks: dict[tuple[UUID, int], bytes]) -> bytes:
        if piece.attempt_id is None:
            return piece.text
        chunk = chunks.get((piece.attempt_id, piece.seq))
        return chunk if chunk is not None else self._archived(piece, piece.attempt_id)

    def _archived(self, piece: Piece, attempt_id: UUID) -> bytes:
        """Cut a piece out of the members that it lies in."""
        archive = self._archives.get(attempt_id)
        if archive is None:
            return b" " * piece.length
        begin, end = piece.start, piece.start + piece.length
        found = [
            self._member(archive, member)[max(begin - member.start, 0) : end - member.start]
            for member in archive.members
            if member.start < end and begin < member.end
        ]
        return b"".join(found).ljust(piece.length)

    def _member(self, archive: LogArchive, member: Member) -> bytes:
        if self._last is not None and self._last[:2] == (archive.artifact_id, member):
            return self._last[2]
        packed = b"".join(
            self._store.read_within(
                "artifacts",
                archive.artifact_id,
                archives.LOG_NAME,
                first=member.at,
                last=member.at + member.size - 1,
            )
        )
        data = gzip.decompress(packed)
        self._last = (archive.artifact_id, member, data)
        return data
