"""Where a chat's turns come from, and where its answers go: a terminal, or pipes."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.status import Status

from tuneyard.cli.output import on_screen, out, plain_error, print_json, say
from tuneyard.cli.reading import unreadable

HISTORY_LINES = 1000
PROMPT = "> "
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model may not send to a terminal: everything but tab and newline."""


class Screen(Protocol):
    """One way to converse."""

    def turns(self) -> Iterator[str]:
        """What is typed, turn by turn."""

    def tell(self, line: str) -> None:
        """Say what happens to the job."""

    def piece(self, delta: str) -> None:
        """A piece of an answer came."""

    def again(self, reason: str) -> None:
        """The answer begins anew."""

    def end(self, turn: str, text: str, done: dict[str, Any]) -> None:
        """The answer is whole, or was stopped: ``done`` is empty then."""


class Terminal:
    """A person types, and sees answers as they grow."""

    def __init__(self, history: Path) -> None:
        self._history = history
        self._status: Status | None = None

    def turns(self) -> Iterator[str]:
        """Ctrl-D ends; Ctrl-C forgets the line."""
        with _History(self._history):
            while True:
                self._hush()
                try:
                    yield input(PROMPT)
                except EOFError:
                    say("")
                    return
                except KeyboardInterrupt:
                    say("\nCtrl-D or /exit leaves")

    def tell(self, line: str) -> None:
        """In one line that changes."""
        if self._status is None:
            self._status = out.status("")
            self._status.start()
        self._status.update(CONTROL.sub("", line).replace("[", "\\["))

    def piece(self, delta: str) -> None:
        """At once."""
        self._hush()
        sys.stdout.write(CONTROL.sub("\ufffd", delta))
        sys.stdout.flush()

    def again(self, reason: str) -> None:
        """On a line of its own: what stands above is void."""
        self._hush()
        plain_error(f"\n{reason} The question is asked again.")

    def end(self, turn: str, text: str, done: dict[str, Any]) -> None:
        """Close the line."""
        self._hush()
        cut = " (cut at its longest)" if done.get("finish_reason") == "length" else ""
        say(cut if done else " (stopped)")

    def _hush(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class Pipes:
    """Turns are lines of stdin; answers go to stdout, whole, what happens to stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def turns(self) -> Iterator[str]:
        """Each line that is not empty. Raises: InputError."""
        if sys.stdin is None:
            return
        try:
            for line in sys.stdin:
                if line.strip():
                    yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise unreadable("stdin", error) from None

    def tell(self, line: str) -> None:
        """On stderr."""
        plain_error(line)

    def piece(self, delta: str) -> None:
        """Nothing: an answer is printed once it is whole."""

    def again(self, reason: str) -> None:
        """On stderr."""
        plain_error(f"{reason} The question is asked again.")

    def end(self, turn: str, text: str, done: dict[str, Any]) -> None:
        """The whole answer."""
        if self._as_json:
            kept = {name: value for name, value in done.items() if name != "done"}
            print_json({"prompt": turn, "text": text, **kept})
            return
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class _History:
    """readline's memory of earlier chats, for its owner alone; without it all works the same."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        try:
            import readline

            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._path.chmod(0o600)
            readline.set_history_length(HISTORY_LINES)
            readline.read_history_file(self._path)
        except (ImportError, OSError):
            pass

    def __exit__(self, *_: object) -> None:
        try:
            import readline

            readline.write_history_file(self._path)
        except (ImportError, OSError):
            pass


def screen(history: Path, *, as_json: bool) -> Screen:
    """A terminal where there is one on both ends, else pipes."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    return Terminal(history) if typed and on_screen() and not as_json else Pipes(as_json=as_json)
