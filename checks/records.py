"""Records of a file, streamed with bounded memory: JSON lines, a JSON array, or plain lines."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tuneyard.specs.errors import InputError
from tuneyard.specs.rows import each_once, looks_like_json

MAX_LINE_BYTES = 16 * 1024**2
PIECE_BYTES = 1024**2
BOM = b"\xef\xbb\xbf"
BLANKS = b" \t\r\n"

MAGIC = (
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"SQLite format 3", "a SQLite database"),
    (b"%PDF", "a PDF"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
    (b"\xff\xfe\x00\x00", "text in UTF-32"),
    (b"\x00\x00\xfe\xff", "text in UTF-32"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)


AN_ARRAY = "an array is [ROW, ROW, …]; rows may also stand one a line, without brackets"
ONE_A_LINE = 'one JSON object a line, such as {"instruction": "…", "output": "…"}'


class BadLine(InputError):
    """A line cannot be read."""

    code = "bad_line"

    def __init__(
        self,
        message: str,
        *,
        line: int,
        column: int | None = None,
        hint: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message, line=line, hint=hint or ONE_A_LINE, **more)
        self.column = column


_CSV_HEADER = re.compile(rb"[\w\"' .-]{1,40}(?:,[\w\"' .-]{1,40})+")


@dataclass(frozen=True)
class Record:
    """One value of the file, with the line on which it begins."""

    line: int
    value: Any


def file_format(path: Path, *, purpose: str, plain: bool = False) -> str:
    """``json`` (an array), ``jsonl`` or ``txt``. Raises: InputError for anything else.

    plain: by its name the file may be plain text, one text a line.
    """
    with path.open("rb") as file:
        head = _head(file)
    _refuse_binary(head)
    if not head:
        raise InputError("The file is empty.", code="dataset_empty", hint="one JSON object a line")
    if purpose == "prompts":
        return _format_of_prompts(head)
    text = plain and not looks_like_json(head.decode("utf-8", "replace"))
    if head[:1] in (b"[", b"{") and not text:
        return "json" if head[:1] == b"[" else "jsonl"
    if plain:
        return "txt"
    first = head.partition(b"\n")[0]
    looks = "CSV with a header" if _CSV_HEADER.fullmatch(first.strip()) else "plain text"
    hint = 'JSON lines: {"instruction": …, "output": …}, one a line; texts to go on with: NAME.txt'
    raise InputError(f"This looks like {looks}, not JSON.", code="wrong_format", line=1, hint=hint)


def _head(file: BinaryIO) -> bytes:
    """The file's beginning, without byte order mark and white space."""
    piece = file.read(PIECE_BYTES).removeprefix(BOM)
    while piece and not piece.strip(BLANKS):
        piece = file.read(PIECE_BYTES)
    return (piece.lstrip(BLANKS) + file.read(4096))[: PIECE_BYTES // 4]


def _refuse_binary(head: bytes) -> None:
    what = next((what for magic, what in MAGIC if head.startswith(magic)), None)
    if head.startswith(b"PK\x03\x04"):
        excel = b"[Content_Types].xml" in head or b"xl/" in head
        what = "an Excel or Word file" if excel else "a zip archive"
    if what is None and b"\x00" in head:
        what = "a binary file"
    if what is not None:
        hint = "JSON lines (one object a line) or a JSON array, in UTF-8"
        raise InputError(f"This is {what}, no data set.", code="wrong_format", hint=hint)


def _format_of_prompts(head: bytes) -> str:
    """As the runner decides: what only looks like JSON (``[INST] …``) is a prompt."""
    if re.match(rb"\[\s*(?:[\"{\]]|$)", head):
        return "json"
    first, newline, _ = head.partition(b"\n")
    try:
        return "jsonl" if isinstance(json.loads(first), str | dict) else "txt"
    except (ValueError, RecursionError):
        return "jsonl" if first[:1] in b'{"' and not newline and len(first) > 4096 else "txt"


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
            raise _too_long(number, "Line")
        yield (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")


def _too_long(line: int, what: str) -> BadLine:
    message = f"{what} {line} is longer than {MAX_LINE_BYTES // 1024**2} MiB."
    return BadLine(message, line=line, code="line_too_long", hint="one row a line")


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.start + 1
        message = f"Line {number} is not UTF-8: byte {byte} is 0x{line[error.start]:02x}."
        hint = "save the file as UTF-8"
        raise BadLine(message, line=number, column=byte, code="not_utf8", hint=hint) from None


def parse_line(text: str, number: int) -> Any:
    """One JSON value. Raises: BadLine with line and column."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=each_once)
    except json.JSONDecodeError as error:
        message = f"Line {number}, column {error.colno}: {error.msg}."
        raise BadLine(message, line=number, column=error.colno, hint=_mend(text)) from None
    except RecursionError:
        message = f"Line {number} is nested too deeply."
        raise BadLine(message, line=number, code="too_deep", hint=FLAT) from None
    except ValueError as error:
        message = f"Line {number}: {_plain(error)}."
        raise BadLine(message, line=number, hint=_mend_of(error)) from None


def _mend(text: str) -> str | None:
    if text.strip() == "{":
        return "an object over several lines: write each on one line, or all within [ and ]"
    if text.rstrip().endswith("},"):
        return "no comma between lines"
    if "," in text[:200] and "{" not in text[:5]:
        return "is this CSV? one JSON object a line is expected"
    return None


FLAT = "rows are objects of texts and lists of messages"


def _mend_of(error: ValueError) -> str | None:
    return "keep one of them" if str(error).endswith("twice") else None


def _plain(error: ValueError) -> str:
    return "a number is too long" if "digits" in str(error) else str(error)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class _Window:
    """A JSON array, read piece by piece: ``text`` from ``position`` on is not consumed yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left, self._read = file, b"", 0
        self._line_start = 0
        self.text, self.position, self.line = "", 0, 1
        self.ended = False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> None:
        """Forget what is consumed and read on; an incomplete character waits for its rest."""
        self._line_start -= self.position
        self.text, self.position = self.text[self.position :], 0
        piece = self._file.read(PIECE_BYTES)
        self.ended = not piece
        self._read += len(piece)
        piece = self._left + piece
        try:
            decoded, self._left = piece.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if self.ended or error.reason != "unexpected end of data":
                raise self._not_utf8(piece, error.start) from None
            decoded, self._left = piece[: error.start].decode("utf-8"), piece[error.start :]
        self.text += decoded

    def _not_utf8(self, piece: bytes, start: int) -> BadLine:
        line = self.line + self.text.count("\n") + piece.count(b"\n", 0, start)
        byte = self._read - len(piece) + start + 1
        message = f"Line {line} is not UTF-8: byte {byte} of the file is 0x{piece[start]:02x}."
        return BadLine(message, line=line, code="not_utf8", hint="save the file as UTF-8")

    def consume(self, end: int) -> None:
        """Go on to this position."""
        newline = self.text.rfind("\n", self.position, end)
        if newline >= 0:
            self.line += self.text.count("\n", self.position, end)
            self._line_start = newline + 1
        self.position = end

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of a position that is not consumed yet."""
        newline = self.text.rfind("\n", self.position, at)
        start = self._line_start if newline < 0 else newline + 1
        return self.line + self.text.count("\n", self.position, at), at - start + 1

    def skip_space(self) -> str:
        """The next character that is no white space; '' at the end."""
        while True:
            self.consume(_SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()


_SPACE = re.compile(r"[ \t\r\n]*")


def _array(file: BinaryIO) -> Iterator[Record]:
    decoder = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=each_once)
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
            line, column = window.place(window.position)
            message = f"Line {line}, column {column}: a comma or ] is missing."
            raise BadLine(message, line=line, column=column, hint=AN_ARRAY)
        may_end = separator == "]"
        if separator == ",":
            window.consume(window.position + 1)
    window.consume(window.position + 1)
    if window.skip_space():
        raise BadLine("There is text after the array's end.", line=window.line, hint=AN_ARRAY)


def _next_value(decoder: json.JSONDecoder, window: _Window) -> tuple[Any, int]:
    """The value that begins at the window's position, and where it ends."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
            if end < len(window.text) or window.ended:
                return value, end
        except json.JSONDecodeError as error:
            if window.ended or not _may_be_cut(error, len(window.text)):
                line, column = window.place(error.pos)
                message = f"Line {line}, column {column}: {error.msg}."
                raise BadLine(message, line=line, column=column, hint=AN_ARRAY) from None
        except RecursionError:
            message = f"The row of line {window.line} is nested too deeply."
            raise BadLine(message, line=window.line, code="too_deep", hint=FLAT) from None
        except ValueError as error:
            message = f"Line {window.line}: {_plain(error)}."
            raise BadLine(message, line=window.line, hint=_mend_of(error)) from None
        if len(window.text) - window.position > MAX_LINE_BYTES:
            raise _too_long(window.line, "The row of line")
        window.more()


def _may_be_cut(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could mend this: a string without its end, or an error at the end."""
    return error.msg.startswith("Unterminated string") or error.pos > length - 16
