"""The lines of a process's log."""

import io
import json
import logging

import pytest

from tuneyard.cli.logs import _JsonLines, _Plain

FORGED = "/jobs/x\n2026-11-24 23:59:59,000 ERROR forged\n\x1b[31mred\x00\x9b\u2028\u202e\udc80"


def logged(formatter: logging.Formatter) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    log = logging.Logger("tuneyard.test")  # noqa: LOG001 - apart from all others
    log.addHandler(handler)
    log.warning("asked for %s", FORGED, extra={"event": "request", "path": FORGED})
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("broke", extra={"event": "internal_error"})
    return stream.getvalue()


def test_no_field_message_or_error_begins_a_line_or_moves_the_cursor() -> None:
    text = logged(_Plain())
    assert [line for line in text.split("\n") if line.startswith("2026-11-24 23:59:59")] == []
    assert [c for c in text if c != "\n" and not c.isprintable()] == []
    assert "path=/jobs/x\\n2026-11-24 23:59:59,000 ERROR forged\\n\\x1b[31mred\\x00" in text
    text.encode()


@pytest.mark.parametrize("number", [0, 1])
def test_a_json_line_gives_the_field_back_as_it_was(number: int) -> None:
    lines = logged(_JsonLines()).splitlines()
    assert len(lines) == 2
    assert [c for c in lines[number] if not c.isprintable()] == []
    found = json.loads(lines[number])
    assert FORGED in (found.get("path"), found.get("traceback", "").partition("ValueError: ")[2])
