"""Uploads: their rows, and the check that each of them passes once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, func, insert, select, text, update

from tuneyard.models.events import SCHEDULER_CHANNEL, notify
from tuneyard.models.tables import FileRow
from tuneyard.specs.errors import Conflict, NotFound
from tuneyard.specs.ids import show_id
from tuneyard.specs.views import FileView


def no_file() -> NotFound:
    """What an unknown id, another team's and one of a wrong form are all answered with."""
    return NotFound("There is no such file here.", field="file")


@dataclass(frozen=True)
class StoredFile:
    """An upload that stands whole in the store."""

    id: UUID
    name: str
    purpose: str
    bytes: int
    sha256: str


def add_file(tx: Connection, team_id: UUID, file: StoredFile) -> FileView:
    """Record an upload; its check comes next."""
    row = tx.execute(
        insert(FileRow)
        .values(
            id=file.id,
            team_id=team_id,
            name=file.name,
            purpose=file.purpose,
            bytes=file.bytes,
            sha256=file.sha256,
        )
        .returning(*FileRow.__table__.columns)
    ).one()
    return _view(row)


def list_files(tx: Connection, *, before: UUID | None, limit: int) -> list[FileView]:
    """The newest files that are older than ``before``, newest first; without their reports."""
    query = (
        select(FileRow.__table__)
        .where(FileRow.deleted_at.is_(None))
        .order_by(FileRow.id.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(FileRow.id < before)
    return [_view(row) for row in tx.execute(query)]


def show_file(tx: Connection, file_id: UUID) -> FileView:
    """One file. Raises: NotFound."""
    row = tx.execute(
        select(FileRow.__table__).where(FileRow.id == file_id, FileRow.deleted_at.is_(None))
    ).one_or_none()
    if row is None:
        raise no_file()
    return _view(row)


def _view(row: Row[Any]) -> FileView:
    return FileView(
        id=show_id("file", row.id),
        name=row.name,
        purpose=row.purpose,
        bytes=row.bytes,
        sha256=row.sha256,
        state=row.state,
        report=row.report,
        created_at=row.created_at,
    )


NEEDED_BY = text("""
    SELECT j.id FROM jobs j
    WHERE j.finished_at IS NULL AND EXISTS (
        SELECT 1 FROM jsonb_each(j.inputs) input WHERE input.value ->> 'file' = :file)
    ORDER BY j.id LIMIT 1
""")


def delete_file(tx: Connection, file_id: UUID) -> None:
    """Take a file out of sight; its bytes go afterwards. Raises: NotFound, Conflict."""
    found = tx.execute(
        select(FileRow.id)
        .where(FileRow.id == file_id, FileRow.deleted_at.is_(None))
        .with_for_update()
    ).scalar_one_or_none()
    if found is None:
        raise no_file()
    job = tx.execute(NEEDED_BY, {"file": str(file_id)}).scalar_one_or_none()
    if job is not None:
        raise Conflict(
            f"{show_id('job', job)} needs this file.",
            code="file_in_use",
            field="file",
            hint="cancel that job or wait for its end",
        )
    gone = {"deleted_at": func.clock_timestamp()}
    tx.execute(update(FileRow).where(FileRow.id == file_id).values(gone))


@dataclass(frozen=True)
class FileToCheck:
    """An upload that this process shall check now."""

    id: UUID
    team_id: UUID
    purpose: str


CLAIM = text("SELECT team_id, file_id, purpose FROM claim_unchecked_file(:seconds)")


def claim_file(tx: Connection, *, seconds: float) -> FileToCheck | None:
    """Take the next unchecked file of any team; it is another's when ``seconds`` are over."""
    row = tx.execute(CLAIM, {"seconds": seconds}).one_or_none()
    return FileToCheck(row.file_id, row.team_id, row.purpose) if row else None


def bytes_of(tx: Connection, file_id: UUID) -> int:
    """The size of a file; 0 when it was deleted meanwhile."""
    return tx.execute(select(FileRow.bytes).where(FileRow.id == file_id)).scalar_one_or_none() or 0


def name_of(tx: Connection, file_id: UUID) -> str:
    """The name of a file; nothing when it was deleted meanwhile."""
    return tx.execute(select(FileRow.name).where(FileRow.id == file_id)).scalar_one_or_none() or ""


def extend_claim(tx: Connection, file_id: UUID, *, seconds: float) -> None:
    """Keep a claimed file for longer: large ones take their time."""
    until = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    tx.execute(
        update(FileRow)
        .where(FileRow.id == file_id, FileRow.state == "processing")
        .values(check_until=until)
    )


def finish_check(
    tx: Connection, file_id: UUID, report: Mapping[str, Any], *, accepted: bool
) -> bool:
    """Write the verdict; False when another process has written one meanwhile."""
    done = tx.execute(
        update(FileRow)
        .where(FileRow.id == file_id, FileRow.state == "processing")
        .values(
            state="processed" if accepted else "rejected", report=dict(report), check_until=None
        )
    )
    notify(tx, SCHEDULER_CHANNEL)
    return done.rowcount == 1


def report_of(tx: Connection, file_id: UUID) -> Mapping[str, Any] | None:
    """The report of a file that was accepted; None while it is not checked."""
    report: Mapping[str, Any] | None = tx.execute(
        select(FileRow.report).where(FileRow.id == file_id, FileRow.state == "processed")
    ).scalar_one_or_none()
    return report
