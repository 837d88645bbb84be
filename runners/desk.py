"""Where questions wait for the one thread that answers: first come, first served, and not many."""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tuneyard.runners.failures import RunnerError

if TYPE_CHECKING:
    from tuneyard.runners.generation import Settings

ROOM = 8
"""So many questions may wait behind the one that is being answered."""

Piece = Mapping[str, Any]
"""A line of an answer: {"delta"}, or last {"done": true, …} or {"error"}."""


class Busy(RunnerError):
    """Too many questions wait already."""

    code = "busy"
    http_status = 429


class Ended(RunnerError):
    """This model takes no more questions."""

    code = "ended"
    http_status = 410


class Question:
    """A conversation on its way to an answer, between who asks and the thread that answers.

    ``gone``: who asked does not listen any more.
    """

    def __init__(self, prompt: Sequence[int], settings: "Settings") -> None:
        self.prompt, self.settings = prompt, settings
        self.pieces: SimpleQueue[Piece] = SimpleQueue()
        self.gone = threading.Event()
        self.asked_at = time.monotonic()

    def tell(self, **piece: Any) -> None:
        """Send a piece of the answer."""
        self.pieces.put(piece)


class Desk:
    """The line of questions. Once it is closed for one reason it stays closed."""

    def __init__(self, *, room: int = ROOM) -> None:
        self._room = room
        self._line: deque[Question] = deque()
        self._changed = threading.Condition()
        self._answering = False
        self._idle_since = time.monotonic()
        self._closed = False

    def put(self, question: Question) -> int:
        """Stand in line; returns how many are before. Raises: Busy, Ended."""
        with self._changed:
            if self._closed:
                raise Ended(hint="ask for the model again: a new job loads it")
            self._line = deque(each for each in self._line if not each.gone.is_set())
            ahead = len(self._line) + self._answering
            if ahead > self._room:
                raise Busy(f"{ahead} questions wait already.", hint="ask again in a moment")
            self._line.append(question)
            self._changed.notify()
            return ahead

    def take(self, *, within_s: float) -> Question | None:
        """The next question that somebody still waits for; None when none came in time.

        What was taken before is answered by that.
        """
        with self._changed:
            if self._answering:
                self._answering, self._idle_since = False, time.monotonic()
            self._changed.wait_for(lambda: self._line or self._closed, within_s)
            while self._line:
                question = self._line.popleft()
                if not question.gone.is_set():
                    self._answering = True
                    return question
            return None

    def close(self) -> list[Question]:
        """Take no more questions; those that wait stay in line. Returns them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return list(self._line)

    def close_if_idle(self, idle_s: float) -> bool:
        """Close when nobody asked for so long; no question slips in between."""
        with self._changed:
            idle = not self._line and time.monotonic() - self._idle_since >= idle_s
            self._closed = self._closed or idle
            return idle

    @property
    def drained(self) -> bool:
        """Closed, and nothing waits."""
        with self._changed:
            return self._closed and not self._line
