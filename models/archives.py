"""Logs of ended attempts: from chunks, which ship well, to one compressed artifact, which keeps.

The artifact's manifest lists ``members``, [start, length, at, size] each: ``length`` bytes of the
log from ``start`` on are the gzip member of ``size`` bytes that begins ``at`` in log.gz. So a part
of a log is read without the rest of it; and log.gz is an ordinary file for gunzip.
"""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, delete, insert, select, text, update

from tuneyard.models.artifacts import StoredFolder, artifact_values
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.events import lock_job
from tuneyard.models.tables import ArtifactRow, AttemptRow, LogChunkRow

LOG_NAME = "log.gz"
CHUNKS_AT_ONCE = 32

TO_ARCHIVE = text("""
    SELECT a.id, a.job_id, a.team_id, a.number, a.token FROM attempts a
    WHERE a.ended_at IS NOT NULL AND a.log_offset > 0 AND a.log_artifact IS NULL
      -- The node that ran it comes first; after a while any will do.
      AND (a.ended_at < clock_timestamp() - make_interval(secs => :others_after_s)
           OR EXISTS (SELECT FROM members m WHERE m.attempt_id = a.id AND m.node_id = :node))
    ORDER BY a.ended_at
    LIMIT :limit
""")


def logs_to_archive(
    tx: Connection, node_id: UUID, *, others_after_s: float, limit: int = 200
) -> list[AttemptRef]:
    """Ended attempts whose log is still in chunks."""
    values = {"node": node_id, "others_after_s": others_after_s, "limit": limit}
    rows = tx.execute(TO_ARCHIVE, values)
    return [AttemptRef(row.id, row.job_id, row.team_id, row.number, row.token) for row in rows]


def next_chunks(tx: Connection, attempt_id: UUID, *, after: int) -> list[tuple[int, int, bytes]]:
    """(seq, start, data) of the next few chunks of a log in order."""
    rows = tx.execute(
        select(LogChunkRow.seq, LogChunkRow.start, LogChunkRow.data)
        .where(LogChunkRow.attempt_id == attempt_id, LogChunkRow.seq > after)
        .order_by(LogChunkRow.seq)
        .limit(CHUNKS_AT_ONCE)
    )
    return [(row.seq, row.start, bytes(row.data)) for row in rows]


def record_log(tx: Connection, ref: AttemptRef, folder: StoredFolder) -> bool:
    """Record a stored log and let its chunks go; False when another did so first.

    Nothing is fenced here: an ended attempt's log has no writer any more.
    """
    lock_job(tx, ref.job_id)
    ended_at = tx.execute(
        select(AttemptRow.ended_at)
        .where(AttemptRow.id == ref.id, AttemptRow.log_artifact.is_(None))
        .with_for_update()
    ).scalar_one_or_none()
    if ended_at is None:
        return False
    # It holds what was written till then, and nothing of an attempt is younger than its end.
    values = artifact_values(ref, folder) | {"published_at": ended_at}
    tx.execute(insert(ArtifactRow).values(**values))
    kept = update(AttemptRow).where(AttemptRow.id == ref.id).values(log_artifact=folder.id)
    tx.execute(kept)
    tx.execute(delete(LogChunkRow).where(LogChunkRow.attempt_id == ref.id))
    return True


@dataclass(frozen=True)
class Member:
    """Bytes of a log, and where they lie compressed in log.gz."""

    start: int
    length: int
    at: int
    size: int

    @property
    def end(self) -> int:
        """The first byte of the log after it."""
        return self.start + self.length


@dataclass(frozen=True)
class LogArchive:
    """Where the log of an attempt lies."""

    artifact_id: UUID
    members: tuple[Member, ...]


def archive_of(tx: Connection, attempt_id: UUID) -> LogArchive | None:
    """An attempt's archived log; None while it is in chunks."""
    row = tx.execute(
        select(ArtifactRow.id, ArtifactRow.manifest["members"].label("members"))
        .join(AttemptRow, AttemptRow.log_artifact == ArtifactRow.id)
        .where(AttemptRow.id == attempt_id)
    ).one_or_none()
    return LogArchive(row.id, tuple(Member(*each) for each in row.members)) if row else None
