"""Logs of a process on stderr: plain sentences, or a JSON object a line."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What begins a line, moves a cursor or turns a text around: a field may be a stranger's."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def start_logging(level: str, *, as_json: bool) -> None:
    """Send what is logged to stderr. ``level`` is a name such as INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _Plain())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Alembic lists its plugins at INFO each time it is loaded.
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)


class _Plain(logging.Formatter):
    """A sentence; behind those that name an event, its fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        event = fields.pop("event", None)
        shown = " ".join(f"{name}={value}" for name, value in fields.items() if name != "data")
        return one_line(super().formatMessage(record) + (f" [{shown}]" if shown and event else ""))

    def formatException(self, ei: Any) -> str:
        """Indented: no line of a message in it can pass for one of the log."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {one_line(line)}" for line in lines)


def one_line(text: str) -> str:
    """The text with its control characters written out: a line of the log stays one line."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _JsonLines(logging.Formatter):
    """Time, level, logger and sentence, and every field of ``extra`` under its own name."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        text = json.dumps(_fields(record) | line, ensure_ascii=False, default=str)
        return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
