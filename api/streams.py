"""Streams: one LISTEN thread a process wakes the asyncio side; rows are read in a few threads.

A stream reads what is new when it is woken, and every two seconds in case a wake-up was lost.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection

from tuneyard.models import logs, reading
from tuneyard.models.engine import Database
from tuneyard.models.events import JOB_CHANNEL
from tuneyard.models.keys import Caller
from tuneyard.specs.errors import Unavailable
from tuneyard.specs.states import TERMINAL

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

LOOK_EVERY_S = 2.0
HEARTBEAT_EVERY_S = 15.0
READERS = 4
EVENTS_AT_ONCE = 500


class Streams:
    """The streams of one process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="stream")
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to listen; called within the running loop."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def stop(self) -> None:
        """End all streams."""
        self._stopping.set()
        for events in self._waiting.values():
            for event in events:
                event.set()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._db.listener() as connection:
                    connection.execute(f"LISTEN {JOB_CHANNEL}")
                    while not self._stopping.is_set():
                        for notice in connection.notifies(timeout=1.0, stop_after=1):
                            self._wake(notice.payload)
            except Exception as error:
                log.debug("listener lost", extra={"event": "listener_lost", "error": str(error)})
                self._stopping.wait(1.0)

    def _wake(self, job: str) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, job)

    def _set(self, job: str) -> None:
        for event in self._waiting.get(job, ()):
            event.set()

    async def _read(self, caller: Caller, unit: Callable[[Connection], Answer]) -> Answer | None:
        """Read in a thread; None while the database is away."""

        def in_transaction() -> Answer | None:
            try:
                with self._db.begin(team=caller.team_id) as tx:
                    return unit(tx)
            except Unavailable:
                return None

        return await asyncio.get_running_loop().run_in_executor(self._readers, in_transaction)

    async def _changes(self, job_id: UUID) -> AsyncIterator[None]:
        """Once now, then whenever the job may have changed."""
        woken = asyncio.Event()
        self._waiting.setdefault(job_id.hex, set()).add(woken)
        try:
            while not self._stopping.is_set():
                yield
                try:
                    await asyncio.wait_for(woken.wait(), LOOK_EVERY_S)
                except TimeoutError:
                    pass
                woken.clear()
        finally:
            self._waiting[job_id.hex].discard(woken)
            if not self._waiting[job_id.hex]:
                del self._waiting[job_id.hex]

    async def events(self, caller: Caller, job_id: UUID, after: int) -> AsyncIterator[bytes]:
        """A job's timeline as server-sent events, with ``progress`` between its lines."""
        last_live, idle_s = "", 0.0
        async for _ in self._changes(job_id):
            seen = after
            found = await self._read(
                caller,
                lambda tx, seen=seen: (  # type: ignore[misc]
                    reading.standing(tx, job_id),
                    reading.list_events(tx, job_id, after=seen, limit=EVENTS_AT_ONCE),
                    reading.live_view(tx, job_id),
                ),
            )
            if found is None:
                continue
            standing, lines, live = found
            text = live.model_dump_json()
            if text != last_live and standing.state not in TERMINAL:
                last_live, idle_s = text, 0.0
                yield f"event: progress\ndata: {text}\n\n".encode()
            for line in lines:
                after, idle_s = line.seq, 0.0
                data = line.model_dump_json()
                yield f"id: {line.seq}\nevent: {line.type}\ndata: {data}\n\n".encode()
            if standing.state in TERMINAL and after >= standing.last_seq:
                return
            idle_s += LOOK_EVERY_S
            if idle_s > HEARTBEAT_EVERY_S:
                idle_s = 0.0
                yield b": still here\n\n"

    async def log(self, caller: Caller, job_id: UUID, attempt: int | None) -> AsyncIterator[bytes]:
        """A job's log as it grows, to the job's end."""
        position = logs.LogPosition()
        async for _ in self._changes(job_id):
            before = position
            found = await self._read(
                caller,
                lambda tx, before=before: (  # type: ignore[misc]
                    reading.standing(tx, job_id),
                    *_log_after(tx, job_id, attempt, before),
                ),
            )
            if found is None:
                continue
            standing, pieces, position = found
            for piece in pieces:
                yield piece
            if standing.state in TERMINAL and not pieces:
                return


def _log_after(
    tx: Connection, job_id: UUID, attempt: int | None, position: logs.LogPosition
) -> tuple[list[bytes], logs.LogPosition]:
    pieces, position = logs.lay_out(tx, job_id, attempt=attempt, after=position, limit=64)
    return logs.read_pieces(tx, pieces), position
