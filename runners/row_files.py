"""Files of rows: JSON lines, a JSON array, CSV, Parquet, or one text a line; no torch."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tuneyard.runners.failures import BadData
from tuneyard.specs.rows import each_once, looks_like_json


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON array, JSON lines, CSV or Parquet, each with the line it begins on.

    Plain text has a row of text a line.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadData("This is not UTF-8.", line=line, hint="save the file as UTF-8") from None
    if path.suffix.lower() == ".csv":
        return _csv(text)
    named_json = path.suffix.lower() in (".json", ".jsonl")
    if text.strip() and not named_json and not looks_like_json(text):
        return _texts(text)
    return _array(text) if text.lstrip()[:1] == "[" else _lines(text)


def _texts(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in _numbered(text):
        yield number, {"text": line.removesuffix("\r")}


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    """Columns by the names of the first line. A row's line is that of its end."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise BadData("This row has more columns than the first.", line=reader.line_num)
            yield reader.line_num, row
    except csv.Error as error:
        raise BadData(f"This is not CSV: {error}.", line=reader.line_num) from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, numbered; pyarrow reads it where it is installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        hint = "install pyarrow there, or take the data as json, jsonl or csv"
        raise BadData("Parquet needs pyarrow in the runner's environment.", hint=hint) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise BadData(f"This is not Parquet: {str(error)[:120]}.") from None


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in _numbered(text):
        yield number, _parse(line, first_line=number)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank."""
    # Not splitlines(): it also splits at U+2028, which texts may contain.
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _array(text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=each_once)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] in ("]", ""):
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except ValueError as error:
            _refuse(error, first_line=1, row_line=line)
        yield line, row


def _skip(text: str, position: int, blanks: str) -> int:
    while position < len(text) and text[position] in blanks:
        position += 1
    return position


def _parse(text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=each_once)
    except ValueError as error:
        _refuse(error, first_line=first_line, row_line=first_line)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(error: ValueError, *, first_line: int, row_line: int) -> NoReturn:
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        message = f"This is not JSON: {error.msg}, column {error.colno}."
        raise BadData(message, line=line) from None
    raise BadData(f"{error}.", line=row_line) from None
