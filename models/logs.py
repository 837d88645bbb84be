"""Logs as the API reads them: the chunks of all attempts laid end to end, without loading them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

BATCH_BYTES = 1024**2


@dataclass(frozen=True)
class Piece:
    """Some bytes of a log: a stored chunk, or a line that we put between."""

    length: int
    attempt_id: UUID | None = None
    seq: int = 0
    text: bytes = b""


@dataclass(frozen=True)
class LogPosition:
    """The last chunk that was read: its attempt's number and its own."""

    attempt: int = 0
    seq: int = 0
    end: int = 0  # of that chunk, in the attempt's log


# octet_length of a stored bytea reads its header alone.
CHUNKS = text("""
    SELECT a.id AS attempt_id, a.number, c.seq, c.start, octet_length(c.data) AS length
    FROM attempts a JOIN log_chunks c ON c.attempt_id = a.id
    WHERE a.job_id = :job AND (CAST(:attempt AS integer) IS NULL OR a.number = :attempt)
      AND (a.number, c.seq) > (:after_attempt, :after_seq)
    ORDER BY a.number, c.seq
    LIMIT :limit
""")


def lay_out(
    tx: Connection,
    job_id: UUID,
    *,
    attempt: int | None = None,
    after: LogPosition = LogPosition(),
    limit: int | None = None,
) -> tuple[list[Piece], LogPosition]:
    """A job's log after a position, as pieces in order, and the position after them.

    ``--- attempt N ---`` stands before each attempt but the first, so that what was read once
    keeps its place however many follow.
    """
    values = {"job": job_id, "attempt": attempt, "limit": limit}
    rows = tx.execute(
        CHUNKS, values | {"after_attempt": after.attempt, "after_seq": after.seq}
    ).all()
    pieces: list[Piece] = []
    position = after
    for row in rows:
        if row.number != position.attempt:
            pieces += [_said(f"--- attempt {row.number} ---\n")] if position.attempt else []
            position = LogPosition(row.number)
        if row.start > position.end:
            pieces.append(_said(f"\n--- {row.start - position.end} bytes left out ---\n"))
        pieces.append(Piece(row.length, row.attempt_id, row.seq))
        position = LogPosition(row.number, row.seq, row.start + row.length)
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


def read_pieces(tx: Connection, pieces: Sequence[Piece]) -> list[bytes]:
    """The bytes of each piece; of a chunk that was let go meanwhile, as many blanks."""
    stored = [piece for piece in pieces if piece.attempt_id is not None]
    values = {"attempts": [p.attempt_id for p in stored], "seqs": [p.seq for p in stored]}
    rows = tx.execute(DATA, values) if stored else ()
    data = {(row.attempt_id, row.seq): bytes(row.data) for row in rows}
    return [
        piece.text or data.get((piece.attempt_id, piece.seq), b" " * piece.length)
        for piece in pieces
    ]


def read_parts(tx: Connection, parts: Sequence[Part]) -> list[bytes]:
    """The bytes of each part."""
    data = read_pieces(tx, [part.piece for part in parts])
    return [each[part.begin : part.end] for each, part in zip(data, parts, strict=True)]


def last_lines(tx: Connection, pieces: Sequence[Piece], count: int) -> int:
    """Where the last ``count`` lines begin, in bytes from the start of the pieces."""
    left = count + 1  # the newline that ends the line before
    end = sum(piece.length for piece in pieces)
    if count == 0:
        return end
    at_the_end = True
    for piece in reversed(pieces):
        (data,) = read_pieces(tx, [piece])
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
