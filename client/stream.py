"""A job's events and log as they happen, over connections that may break."""

import codecs
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tuneyard.client.connection import FIRST_PAUSE_S, Connection
from tuneyard.client.errors import Unreachable
from tuneyard.specs.states import TERMINAL

SILENCE_S = 60.0
PATIENCE_S = 300.0
"""How long a server that answered before may be away while a job is watched."""

FIRST_PATIENCE_S = 0.5
AWAY_SAID_AFTER_S = 5.0
LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class StreamEvent:
    """One event. number: its place in the job's timeline, None for what is between two."""

    number: int | None
    kind: str
    data: dict[str, Any]


def watch_events(connection: Connection, path: str, *, after: int = 0) -> Iterator[StreamEvent]:
    """Every event to the job's end; a broken stream goes on where it broke off.

    Each numbered event comes once; ``progress`` comes as it changes, ``away`` once when the server
    does not answer for a while. The stream of a job that is over ends with its last event.
    Raises: Refused, Unreachable.
    """
    seen, contact = after, _Contact()
    while True:
        try:
            with _opened(connection, path, seen) as answer:
                contact.made()
                for event in read_events(answer.iter_bytes()):
                    if event.number is not None:
                        if event.number <= seen:
                            continue
                        seen = event.number
                    yield event
                    if event.data.get("to_state") in TERMINAL:
                        return
            if _is_over(connection, path, seen):
                return
            contact.made()
        except Unreachable as error:
            if contact.lost(error):
                yield StreamEvent(None, "away", {"message": error.message})
        time.sleep(contact.pause_s)


class _Contact:
    """Whether a server that does not answer is still waited for."""

    def __init__(self) -> None:
        self._patience_s = FIRST_PATIENCE_S
        self._lost_at: float | None = time.monotonic()
        self._said = False
        self.pause_s = FIRST_PAUSE_S

    def made(self) -> None:
        """It answers."""
        self._patience_s, self.pause_s = PATIENCE_S, FIRST_PAUSE_S
        self._lost_at, self._said = None, False

    def lost(self, error: Unreachable) -> bool:
        """It does not; whether this is to be said now. Raises: the error, when it is enough."""
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        elif now - self._lost_at > self._patience_s:
            raise error
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        say = not self._said and now - self._lost_at > AWAY_SAID_AFTER_S
        self._said = self._said or say
        return say


def _opened(connection: Connection, path: str, seen: int) -> Any:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(seen)}
    return connection.stream(f"{path}/events", headers=headers, silence_s=SILENCE_S)


def _is_over(connection: Connection, path: str, seen: int) -> bool:
    if connection.send("GET", path).get("state") not in TERMINAL:
        return False
    later = connection.send("GET", f"{path}/events", params={"after": seen})
    return not later.get("data")


def follow_log(connection: Connection, path: str, params: Mapping[str, Any]) -> Iterator[str]:
    """A job's log as it grows, to the job's end; a broken stream goes on where it broke off.

    params: tail and attempt, as the first answer heeds them. Raises: Refused, Unreachable.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start: int | None = None
    contact = _Contact()
    while True:
        asked = {**params, "follow": 1} | ({} if start is None else {"start": start, "tail": None})
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            over = connection.send("GET", path).get("state") in TERMINAL
            with connection.stream(f"{path}/logs", params=asked, silence_s=None) as answer:
                contact.made()
                start = int(answer.headers.get("X-Log-Start", start or 0))
                for piece in answer.iter_bytes():
                    start += len(piece)
                    yield decoder.decode(piece)
            if over:
                return
        except Unreachable as error:
            contact.lost(error)
            time.sleep(contact.pause_s)


def read_events(chunks: Iterable[bytes]) -> Iterator[StreamEvent]:
    """Parse Server-Sent Events; what is cut off before its empty line is no event.

    Source: WHATWG HTML, section 9.2.6. Lines end at LF or CRLF alone: JSON texts may hold the
    other characters that Python's splitlines cuts at.
    """
    fields: dict[str, str] = {}
    for line in _lines(chunks):
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data" and "data" in fields:
                value = f"{fields['data']}\n{value}"
            fields[name] = value
        elif fields.get("data"):
            number = fields.get("id", "")
            yield StreamEvent(
                int(number) if number.isdecimal() else None,
                fields.get("event", "message"),
                json.loads(fields["data"]),
            )
            fields = {}
        else:
            fields = {}


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", errors="replace")
