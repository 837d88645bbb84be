"""What a worker ships about a running attempt each second: metrics, log, progress, offsets.

One transaction moves the offsets with the rows, lines of the timeline included, so that each is
shipped exactly once however often the worker dies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import psycopg
from sqlalchemy import Connection, case, func, insert, select, text, update

from tuneyard.models.attempts import AttemptRef, check_token, note
from tuneyard.models.events import JOB_CHANNEL, notify
from tuneyard.models.tables import AttemptRow, LogChunkRow

LOG_LIMIT_BYTES = 64 * 1024**2
"""Of an attempt's log so much is kept: the first half and the newest half."""


@dataclass(frozen=True)
class Shipment:
    """What was read from an attempt's files since the last one."""

    events_offset: int
    log_offset: int
    log: bytes = b""
    metrics: Sequence[tuple[str, int, float]] = field(default_factory=tuple)  # name, step, value
    phase: str | None = None
    progress: dict[str, Any] | None = None
    notes: Sequence[tuple[str, dict[str, Any]]] = field(default_factory=tuple)  # type, data


def ship(tx: Connection, ref: AttemptRef, shipment: Shipment) -> None:
    """Write a shipment. Raises: StaleToken when the attempt is over."""
    for type_, data in shipment.notes:
        note(tx, ref, type_, data)
    if not shipment.notes:
        # Losing the last second of metrics to a crash of the server costs nothing but that second,
        # and the offsets go with them. A line of the timeline is numbered, and told at once to
        # whoever listens: its number must not be given twice.
        tx.execute(text("SET LOCAL synchronous_commit = off"))
    check_token(tx, ref)
    changes: dict[str, Any] = {
        "events_offset": shipment.events_offset,
        "log_offset": shipment.log_offset,
    }
    if shipment.phase is not None:
        # Once its devices are given back, nothing that the runner said before brings it back.
        over = AttemptRow.phase == "publishing"
        changes["phase"] = case((over, AttemptRow.phase), else_=shipment.phase)
    if shipment.progress is not None:
        changes["progress"] = shipment.progress
    tx.execute(update(AttemptRow).where(AttemptRow.id == ref.id).values(changes))
    if shipment.metrics:
        _copy_metrics(tx, ref, shipment.metrics)
    if shipment.log:
        _append_log(tx, ref, shipment)
    notify(tx, JOB_CHANNEL, ref.job_id.hex)


def offsets(tx: Connection, attempt_id: UUID) -> tuple[int, int]:
    """How far an attempt's events and log have been shipped, in bytes."""
    row = tx.execute(
        select(AttemptRow.events_offset, AttemptRow.log_offset).where(AttemptRow.id == attempt_id)
    ).one()
    return row.events_offset, row.log_offset


def _copy_metrics(
    tx: Connection, ref: AttemptRef, metrics: Sequence[tuple[str, int, float]]
) -> None:
    """COPY into a temporary table, then insert what is new: COPY alone knows no conflicts."""
    tx.execute(
        text(
            "CREATE TEMPORARY TABLE IF NOT EXISTS new_metrics"
            " (name text, step bigint, value double precision) ON COMMIT DELETE ROWS"
        )
    )
    connection = cast("psycopg.Connection[Any]", tx.connection.driver_connection)
    statement = "COPY new_metrics (name, step, value) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in metrics:
            copy.write_row(row)
    tx.execute(
        text(
            "INSERT INTO metrics (attempt_id, team_id, name, step, value)"
            " SELECT :attempt, :team, name, step, value FROM new_metrics"
            " ON CONFLICT DO NOTHING"
        ),
        {"attempt": ref.id, "team": ref.team_id},
    )


def _append_log(tx: Connection, ref: AttemptRef, shipment: Shipment) -> None:
    start = shipment.log_offset - len(shipment.log)
    newest = select(func.coalesce(func.max(LogChunkRow.seq), 0) + 1).where(
        LogChunkRow.attempt_id == ref.id
    )
    tx.execute(
        insert(LogChunkRow).values(
            attempt_id=ref.id,
            team_id=ref.team_id,
            seq=newest.scalar_subquery(),
            start=start,
            data=shipment.log,
        )
    )
    if shipment.log_offset > LOG_LIMIT_BYTES:
        tx.execute(
            text(
                "DELETE FROM log_chunks WHERE attempt_id = :attempt"
                " AND start >= :half AND start + octet_length(data) < :newest"
            ),
            {
                "attempt": ref.id,
                "half": LOG_LIMIT_BYTES // 2,
                "newest": shipment.log_offset - LOG_LIMIT_BYTES // 2,
            },
        )
