"""The verdict over a file: its format, its rows, and the first things that are wrong with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tuneyard.checks.records import BadLine, Record, file_format, read_records
from tuneyard.checks.rows import check_prompt, check_row
from tuneyard.specs.errors import InputError

SHOWN = 5
PREVIEW_CHARACTERS = 300


def report_on(path: Path, *, purpose: str) -> dict[str, Any]:
    """Check a whole file; the report says ``ok`` or lists the first problems by line."""
    report: dict[str, Any] = {"ok": False, "bytes": path.stat().st_size, "rows": 0}
    report |= {"problems": [], "problem_count": 0, "warnings": [], "preview": []}
    kinds: Counter[str] = Counter()
    try:
        report["format"] = format_ = file_format(path)
        if format_ == "txt" and purpose != "prompts":
            raise _no_json(path)
        for record in read_records(path, format_):
            _judge(record, purpose, report, kinds)
    except InputError as error:
        _add(report, error)
    if not report["rows"] and not report["problem_count"]:
        _add(report, InputError("The file has no rows.", code="dataset_empty"))
    report["rows_kind"] = kinds.most_common(1)[0][0] if kinds else None
    if len(kinds) > 1:
        report["warnings"].append(f"rows of several kinds: {dict(kinds)}")
    report["ok"] = report["problem_count"] == 0
    return report


def _no_json(path: Path) -> InputError:
    with path.open("rb") as file:
        first = file.readline(2000)
    looks = "CSV with a header" if first.count(b",") else "plain text"
    hint = 'JSON lines: {"instruction": …, "output": …}, one a line'
    return InputError(f"This looks like {looks}, no JSON.", code="wrong_format", line=1, hint=hint)


def _judge(
    record: Record | BadLine, purpose: str, report: dict[str, Any], kinds: Counter[str]
) -> None:
    if isinstance(record, BadLine):
        _add(report, record)
        return
    report["rows"] += 1
    if len(report["preview"]) < 3:
        report["preview"].append(json.dumps(record.value, ensure_ascii=False)[:PREVIEW_CHARACTERS])
    try:
        kinds[(check_prompt if purpose == "prompts" else check_row)(record.value)] += 1
    except InputError as error:
        error.line = record.line
        error.message = f"Line {record.line}: {error.message}"
        _add(report, error)


def _add(report: dict[str, Any], error: InputError) -> None:
    report["problem_count"] += 1
    if len(report["problems"]) < SHOWN:
        column = getattr(error, "column", None)
        report["problems"].append(error.as_dict() | {"column": column})
