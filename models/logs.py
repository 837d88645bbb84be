"""Logs as the API reads them: all attempts' laid end to end, without loading them.

While an attempt lives its log is chunks, afterwards an archive (models/archives.py); positions are
counted in bytes of the attempt's log, which are the same in both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

BATCH_BYTES = 1024**2


@dataclass(frozen=True)
class Piece:
    """Some bytes of a log: ``length`` of an attempt's from ``start`` on, or a line of ours."""

    length: int
    attempt_id: UUID | None = None
    start: int = 0
    seq: int = 0  # of the chunk that holds them; 0 when they are archived
    text: bytes = b""


@dataclass(frozen=True)
class LogPosition:
    """What has been read: of which attempt, up to which byte of its log."""

    attempt: int = 0
    end: int = 0


# octet_length of a stored bytea reads its header alone. One statement, so that a log which is
# archived at this moment is seen in chunks or in members, not in both and not in neither.
PIECES = text("""
    WITH mine AS (
        SELECT id, number, log_artifact FROM attempts
        WHERE job_id = :job AND number >= :after_attempt
          AND (CAST(:attempt AS integer) IS NULL OR number = :attempt)
    ), pieces AS (
        SELECT a.id AS attempt_id, a.number, c.seq, c.start, octet_length(c.data) AS length
        FROM mine a JOIN log_chunks c ON c.attempt_id = a.id
        UNION ALL
        SELECT a.id, a.number, 0, (m ->> 0)::bigint, (m ->> 1)::bigint
        FROM mine a JOIN artifacts x ON x.id = a.log_artifact,
             jsonb_array_elements(x.manifest -> 'members') m
    )
    SELECT * FROM pieces
    WHERE number > :after_attempt OR start + length > :after_end
    ORDER BY number, start
    LIMIT :limit
""")


def lay_out(
    tx: Connection,
    job_id: UUID,
    *,
    attempt: int | None = None,
    after: LogPosition = LogPosition(),
    limit: int | None = None,
    bytes_at_most: int | None = None,
) -> tuple[list[Piece], LogPosition]:
    """A job's log after a position, as pieces in order, and the position after them.

    ``--- attempt N ---`` stands before each attempt but the first, so that what was read once
    keeps its place however many follow. limit, bytes_at_most: where to stop, about.
    """
    values = {"job": job_id, "attempt": attempt, "limit": limit}
    rows = tx.execute(
        PIECES, values | {"after_attempt": after.attempt, "after_end": after.end}
    ).all()
    pieces: list[Piece] = []
    position, size = after, 0
    for row in rows:
        if bytes_at_most is not None and size >= bytes_at_most:
            break
        if row.number != position.attempt:
            pieces += [_said(f"--- attempt {row.number} ---\n")] if position.attempt else []
            position = LogPosition(row.number)
        start, end = row.start, row.start + row.length
        if start > position.end:
            pieces.append(_said(f"\n--- {start - position.end} bytes left out ---\n"))
        start = max(start, position.end)  # a member may begin before what was read in chunks ends
        pieces.append(Piece(end - start, row.attempt_id, start, row.seq))
        position, size = LogPosition(row.number, end), size + end - start
    return pieces, position


def _said(line: str) -> Piece:
    return Piece(len(line), text=line.encode())


@dataclass(frozen=True)
class Part:
    """The bytes begin..end of a piece."""

    piece: Piece
    begin: int
    end: int


def cut(pieces: Sequence[Piece], first: int, last: int) -> Iterator[Part]:
    """What of each piece lies within the bytes first..last of all of them."""
    start = 0
    for piece in pieces:
        begin, end = max(first - start, 0), min(last + 1 - start, piece.length)
        if begin < end:
            yield Part(piece, begin, end)
        start += piece.length
        if start > last:
            return


def batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in groups of about a mebibyte, to be read in one transaction each."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += part.piece.length
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


DATA = text("""
    SELECT c.attempt_id, c.seq, c.data FROM log_chunks c
    JOIN unnest(CAST(:attempts AS uuid[]), CAST(:seqs AS bigint[])) AS wanted (attempt_id, seq)
      ON c.attempt_id = wanted.attempt_id AND c.seq = wanted.seq
""")


def read_chunks(tx: Connection, pieces: Sequence[Piece]) -> dict[tuple[UUID, int], bytes]:
    """What the chunks of these pieces hold, by attempt and seq; none for what left them."""
    stored = [piece for piece in pieces if piece.seq]
    values = {"attempts": [p.attempt_id for p in stored], "seqs": [p.seq for p in stored]}
    rows = tx.execute(DATA, values) if stored else ()
    return {(row.attempt_id, row.seq): bytes(row.data) for row in rows}


def last_lines(
    read: Callable[[Sequence[Piece]], list[bytes]], pieces: Sequence[Piece], count: int
) -> int:
    """Where the last ``count`` lines begin, in bytes from the start of the pieces."""
    left = count + 1  # the newline that ends the line before
    end = sum(piece.length for piece in pieces)
    if count == 0:
        return end
    at_the_end = True
    for piece in reversed(pieces):
        (data,) = read([piece])
        end -= piece.length
        if at_the_end and data:
            left += 0 if data.endswith(b"\n") else -1
            at_the_end = False
        newlines = data.count(b"\n")
        if newlines >= left:
            return end + _nth_last(data, left) + 1
        left -= newlines
    return 0


def _nth_last(data: bytes, count: int) -> int:
    place = len(data)
    for _ in range(count):
        place = data.rfind(b"\n", 0, place)
    return place
