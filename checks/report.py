"""The verdict over a file: its format, its rows, and the first things that are wrong with it."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from tuneyard.checks.records import BadLine, Record, file_format, read_records
from tuneyard.specs.conversations import check_prompt
from tuneyard.specs.errors import InputError
from tuneyard.specs.rows import TRAINABLE, Judged, check_row, columns_of

SHOWN = 5
PREVIEWED = 3
MAX_CHARACTERS = 300
MAX_COLUMNS = 100


def empty_report() -> dict[str, Any]:
    """A report that says nothing yet; every report has these names."""
    return {
        "ok": False,
        "format": None,
        "rows_kind": None,
        "kinds": {},
        "columns": {},
        "rows": 0,
        "bytes": 0,
        "problems": [],
        "problem_count": 0,
        "warnings": [],
        "preview": [],
    }


def report_on(path: Path, *, purpose: str, plain: bool = False) -> dict[str, Any]:
    """Check a whole file; the report says ``ok`` or lists the first problems by line.

    plain: its name allows plain text, each line of which is a row of text.
    kinds: form of rows -> {"rows": how many, "line": where the first is}; columns: what rewards may
    read -> how many rows have it.
    """
    checking = _Checking(purpose)
    try:
        checking.report["bytes"] = _size(path)
        checking.report["format"] = format_ = file_format(path, purpose=purpose, plain=plain)
        for record in read_records(path, format_):
            checking.take(record)
    except InputError as error:
        checking.add(error)
    return checking.finish()


def _size(path: Path) -> int:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            "This is not a regular file.", code="not_a_regular_file", hint="copy what it holds"
        )
    return found.st_size


class _Checking:
    """A report in the making."""

    def __init__(self, purpose: str) -> None:
        self.report = empty_report()
        self._purpose = purpose
        self._empty_lines: list[int] = []
        self._empty = 0

    def take(self, record: Record | BadLine) -> None:
        """Judge one record."""
        if isinstance(record, BadLine):
            self.add(record)
            return
        report = self.report
        report["rows"] += 1
        if len(report["preview"]) < PREVIEWED:
            report["preview"].append(_clipped(json.dumps(record.value, ensure_ascii=False)))
        try:
            judged = self._judge(record.value)
        except InputError as error:
            error.line, error.message = record.line, f"Line {record.line}: {error.message}"
            self.add(error)
            return
        counted = report["kinds"].setdefault(judged.kind, {"rows": 0, "line": record.line})
        counted["rows"] += 1
        self._count_columns(judged.kind, record.value)
        if not judged.teaches:
            self._empty += 1
            if len(self._empty_lines) < SHOWN:
                self._empty_lines.append(record.line)

    def _count_columns(self, kind: str, row: Any) -> None:
        if kind not in TRAINABLE["grpo"]:
            return
        counts = self.report["columns"]
        for name in columns_of(row):
            if name in counts or (len(counts) < MAX_COLUMNS and len(name) < MAX_CHARACTERS):
                counts[name] = counts.get(name, 0) + 1

    def _judge(self, value: Any) -> Judged:
        if self._purpose == "prompts":
            check_prompt(value)
            return Judged("prompts")
        return check_row({"text": value} if self.report["format"] == "txt" else value)

    def add(self, error: InputError) -> None:
        """Count a problem; the first ones are listed."""
        self.report["problem_count"] += 1
        if len(self.report["problems"]) < SHOWN:
            listed = error.as_dict() | {"column": getattr(error, "column", None)}
            texts = {k: _clipped(v) for k, v in listed.items() if isinstance(v, str)}
            self.report["problems"].append(listed | texts)

    def finish(self) -> dict[str, Any]:
        """The report, once all records are judged."""
        report, kinds = self.report, self.report["kinds"]
        if not report["rows"] and not report["problem_count"]:
            hint = "one JSON object a line"
            self.add(InputError("The file has no rows.", code="dataset_empty", hint=hint))
        if self._empty:
            self._say_empty()
        if kinds:
            report["rows_kind"] = max(kinds, key=lambda kind: kinds[kind]["rows"])
        if len(kinds) > 1:
            counts = ", ".join(f"{each['rows']} {kind}" for kind, each in kinds.items())
            report["warnings"].append(f"rows of several forms: {counts}")
        report["ok"] = report["problem_count"] == 0
        return report

    def _say_empty(self) -> None:
        lines = ", ".join(map(str, self._empty_lines))
        said = (
            f"{self._empty} rows have an empty answer (lines {lines}{'…' * (self._empty > SHOWN)})"
        )
        if self._empty < self.report["rows"]:
            self.report["warnings"].append(said)
            return
        line = self._empty_lines[0]
        message = "Every answer is empty: there is nothing to learn."
        self.add(
            InputError(
                message,
                code="no_trainable_tokens",
                line=line,
                hint="write the answers that are to be learned",
            )
        )


def _clipped(text: str) -> str:
    """Short, and without halves of characters, which no database holds."""
    cut = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
    return cut.encode("utf-8", "replace").decode().replace("\x00", "?")
