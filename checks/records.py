"""Records of a file, streamed with bounded memory: JSON lines, a JSON array, or plain lines."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tuneyard.specs.errors import InputError

MAX_LINE_BYTES = 16 * 1024**2
PIECE_BYTES = 1024**2

MAGIC = (
    (b"PK\x03\x04", "a zip archive (or Excel)"),
    (b"PAR1", "a parquet file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x80\x02", "a Python pickle"),
    (b"SQLite format 3", "a SQLite database"),
    (b"%PDF", "a PDF"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
)


class BadLine(InputError):
    """A line cannot be read."""

    code = "bad_line"

    def __init__(self, message: str, *, line: int, column: int | None = None, **more: Any) -> None:
        super().__init__(message, line=line, **more)
        self.column = column


@dataclass(frozen=True)
class Record:
    """One value of the file, with the line on which it begins."""

    line: int
    value: Any


def file_format(path: Path) -> str:
    """``json`` (an array), ``jsonl`` or ``txt``. Raises: InputError for anything else."""
    with path.open("rb") as file:
        head = file.read(4096)
    for magic, what in MAGIC:
        if head.startswith(magic):
            raise _wrong_format(f"This is {what}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise InputError("The file is empty.", code="dataset_empty", hint="one JSON object a line")
    if text[:1] == b"[":
        return "json"
    if text[:1] == b"{":
        return "jsonl"
    if b"\x00" in head:
        raise _wrong_format("This is a binary file, or text in UTF-16")
    return "txt"


def _wrong_format(what: str) -> InputError:
    hint = "JSON lines (one object a line) or a JSON array, in UTF-8"
    return InputError(f"{what}, no data set.", code="wrong_format", hint=hint)


def read_records(path: Path, format_: str) -> Iterator[Record | BadLine]:
    """Every record in order; a line that cannot be read comes as the error that says so.

    Raises: BadLine where nothing after it can be read either.
    """
    with path.open("rb") as file:
        if format_ == "json":
            yield from _array(file)
            return
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                text = _decode(line, number)
                yield Record(number, parse_line(text, number) if format_ == "jsonl" else text)
            except BadLine as error:
                yield error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines without their ends; one that is too long ends the reading, at flat memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            message = f"Line {number} is longer than {MAX_LINE_BYTES // 1024**2} MiB."
            raise BadLine(message, line=number, code="line_too_long", hint="one row a line")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield line.rstrip(b"\r\n")


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(
            f"Line {number} is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}.",
            line=number,
            column=error.start + 1,
            code="not_utf8",
            hint="save the file as UTF-8",
        ) from None


def parse_line(text: str, number: int) -> Any:
    """One JSON value. Raises: BadLine with line and column."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        hint = (
            "is this CSV? one JSON object a line is expected"
            if "," in text[:200] and "{" not in text[:5]
            else None
        )
        raise BadLine(
            f"Line {number}, column {error.colno}: {error.msg}.",
            line=number,
            column=error.colno,
            hint=hint,
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadLine(f"Line {number}: {error}.", line=number) from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class _Window:
    """A JSON array, read piece by piece: ``text`` from ``position`` on is not consumed yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, b""
        self.text, self.position, self.line = "", 0, 1
        self.ended = False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> None:
        """Forget what is consumed and read on; an incomplete character waits for its rest."""
        self.text, self.position = self.text[self.position :], 0
        piece = self._file.read(PIECE_BYTES)
        self.ended = not piece
        piece = self._left + piece
        try:
            decoded, self._left = piece.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if self.ended or len(piece) - error.start > 4:
                line = self.line + self.text.count("\n") + piece[: error.start].count(b"\n")
                message = f"Line {line} is not UTF-8: byte 0x{piece[error.start]:02x}."
                hint = "save the file as UTF-8"
                raise BadLine(message, line=line, code="not_utf8", hint=hint) from None
            decoded, self._left = piece[: error.start].decode("utf-8"), piece[error.start :]
        self.text += decoded

    def consume(self, end: int) -> None:
        """Go on to this position."""
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def skip_space(self) -> str:
        """The next character that is no white space; '' at the end."""
        while True:
            self.consume(_SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()


_SPACE = re.compile(r"\s*")


def _array(file: BinaryIO) -> Iterator[Record]:
    decoder = json.JSONDecoder(parse_constant=_refuse)
    window = _Window(file)
    window.skip_space()
    window.consume(window.position + 1)  # the bracket that file_format saw
    may_end = True
    while not (may_end and window.skip_space() == "]"):
        window.skip_space()
        value, end = _next_value(decoder, window)
        yield Record(window.line, value)
        window.consume(end)
        separator = window.skip_space()
        if separator not in (",", "]") or not separator:
            raise BadLine(f"Line {window.line}: a comma or ] is missing.", line=window.line)
        may_end = separator == "]"
        if separator == ",":
            window.consume(window.position + 1)
    window.consume(window.position + 1)
    if window.skip_space():
        raise BadLine("There is text after the array's end.", line=window.line)


def _next_value(decoder: json.JSONDecoder, window: _Window) -> tuple[Any, int]:
    """The value that begins at the window's position, and where it ends."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
            if end < len(window.text) or window.ended:
                return value, end
        except json.JSONDecodeError as error:
            near_end = len(window.text) - error.pos < PIECE_BYTES
            if window.ended or not near_end:
                line = window.line + window.text.count("\n", window.position, error.pos)
                message = f"Line {line}, column {error.colno}: {error.msg}."
                raise BadLine(message, line=line, column=error.colno) from None
        except (ValueError, RecursionError) as error:
            raise BadLine(f"Line {window.line}: {error}.", line=window.line) from None
        if len(window.text) - window.position > MAX_LINE_BYTES:
            most = MAX_LINE_BYTES // 1024**2
            message = f"The row of line {window.line} is longer than {most} MiB."
            raise BadLine(message, line=window.line, code="line_too_long")
        window.more()
