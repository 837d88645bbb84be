"""What the command prints: JSON for programs, tables for people, errors on stderr."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuneyard.client import Refused
from tuneyard.specs.errors import SpecRejected, TuneyardError


class _Console(Console):
    """A console that leaves a closed pipe to ``main``; rich would exit with 1."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


out = _Console(highlight=False)
err = Console(stderr=True, highlight=False)

NARROW = 60
"""Below this many columns a table would cut ids in pieces."""

COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: TuneyardError) -> None:
    """What went wrong, on stderr."""
    for line in error_lines(error):
        plain_error(line)


def error_lines(error: TuneyardError) -> Iterator[str]:
    """Message, field and line, then the mend; every problem of a refused spec."""
    if isinstance(error, Refused) and error.details:
        problems: Sequence[Mapping[str, Any]] = error.details
    elif isinstance(error, SpecRejected):
        problems = [problem.as_dict() for problem in error.problems]
    else:
        problems = [error.as_dict()]
    for problem in problems:
        where = [f"field {problem['field']}"] if problem.get("field") else []
        where += [f"line {problem['line']}"] if problem.get("line") else []
        suffix = f" ({', '.join(where)})" if where else ""
        yield f"{problem['message']}{suffix}"
        if problem.get("hint"):
            yield f"  hint: {problem['hint']}"


def plain_error(text: str) -> None:
    """A line on stderr, whatever brackets it holds."""
    err.print(Text(text), soft_wrap=True)


def say(text: str) -> None:
    """A line on stdout, whatever brackets it holds."""
    out.print(Text(text), soft_wrap=True)


def on_screen() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    return out.is_terminal and not out.is_dumb_terminal


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that fits the terminal, or tab-separated lines where there is none."""
    if not on_screen() or out.width < NARROW:
        for row in [columns, *rows]:
            sys.stdout.write("\t".join(str(cell) for cell in row) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        # What stands first is what one copies: it stays in one piece.
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        cells = [str(cell) for cell in row]
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in cells))
    out.print(table)


def age(timestamp: str | None) -> str:
    """How long ago, in the largest unit that says it."""
    if not timestamp:
        return "-"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
    return duration(seconds)


def duration(seconds: float | None) -> str:
    """Seconds for people: 45s, 12m, 3h, 2d."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "-"
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"
