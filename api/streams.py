"""Streams: one LISTEN thread a process wakes the asyncio side; rows are read in a few threads.

A stream reads what is new when it is woken, and every two seconds in case a wake-up was lost. It
holds one batch at a time: a reader that does not keep up slows its own stream, and is dropped
when it takes nothing for a while.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tuneyard.api.logs import LogReader
from tuneyard.models import reading
from tuneyard.models.engine import Database
from tuneyard.models.events import JOB_CHANNEL
from tuneyard.models.keys import Caller
from tuneyard.models.logs import LogPosition
from tuneyard.specs.errors import Unavailable
from tuneyard.specs.states import TERMINAL
from tuneyard.specs.views import EventView, LiveView
from tuneyard.store.shelves import Store

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

LOOK_EVERY_S = 2.0
HEARTBEAT_EVERY_S = 15.0
READERS = 4
MAX_STREAMS = 500
EVENTS_AT_ONCE = 500
SLOW_READER_S = 30.0


class Streams:
    """The streams of one process."""

    def __init__(self, db: Database, store: Store) -> None:
        self._db, self._store = db, store
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="stream")
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to listen; called within the running loop."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def end_all(self) -> None:
        """End all streams, from a signal handler or another thread; no new ones begin."""
        self._stopping.set()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set_all)

    def stop(self) -> None:
        """End all streams and the threads behind them."""
        self.end_all()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._db.listener() as connection:
                    connection.execute(f"LISTEN {JOB_CHANNEL}")
                    # What happened while nobody listened is looked for at once.
                    self._in_loop(self._set_all)
                    while not self._stopping.is_set():
                        for notice in connection.notifies(timeout=1.0, stop_after=1):
                            self._in_loop(self._set, notice.payload)
            except Exception as error:
                log.debug("listener lost", extra={"event": "listener_lost", "error": str(error)})
                self._stopping.wait(1.0)

    def _in_loop(self, act: Callable[..., None], *arguments: str) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act, *arguments)

    def _set(self, job: str) -> None:
        for event in self._waiting.get(job, ()):
            event.set()

    def _set_all(self) -> None:
        for events in self._waiting.values():
            for event in events:
                event.set()

    async def _read(self, caller: Caller, unit: Callable[[Connection], Answer]) -> Answer | None:
        def in_transaction() -> Answer:
            with self._db.snapshot(team=caller.team_id) as tx:
                return unit(tx)

        return await self._in_thread(in_transaction)

    async def _in_thread(self, read: Callable[[], Answer]) -> Answer | None:
        """Read in a thread; None while the database, or the store, is away."""

        def unless_away() -> Answer | None:
            try:
                return read()
            except Unavailable:
                return None

        return await asyncio.get_running_loop().run_in_executor(self._readers, unless_away)

    async def _changes(self, job_id: UUID) -> AsyncIterator[asyncio.Event]:
        """Once now, then whenever the job may have changed, or the event given was set."""
        woken = asyncio.Event()
        self._waiting.setdefault(job_id.hex, set()).add(woken)
        try:
            while not self._stopping.is_set():
                woken.clear()
                yield woken
                try:
                    await asyncio.wait_for(woken.wait(), LOOK_EVERY_S)
                except TimeoutError:
                    pass
        finally:
            self._waiting[job_id.hex].discard(woken)
            if not self._waiting[job_id.hex]:
                del self._waiting[job_id.hex]

    def _admit(self) -> None:
        if sum(map(len, self._waiting.values())) >= MAX_STREAMS:
            raise Unavailable("Too many streams at once.", code="streams_busy")

    def events(self, caller: Caller, job_id: UUID, after: int) -> AsyncIterator[bytes]:
        """A job's timeline as server-sent events, with ``progress`` between its lines.

        Raises: Unavailable, before the first byte.
        """
        self._admit()
        return self._events(caller, job_id, after)

    async def _events(self, caller: Caller, job_id: UUID, after: int) -> AsyncIterator[bytes]:
        last_live, said_at = b"", time.monotonic()
        async for woken in self._changes(job_id):
            found = await self._read(caller, _news(job_id, after))
            standing, lines, live = found or (None, [], None)
            out = b"".join(map(_event, lines))
            after = lines[-1].seq if lines else after
            if standing and standing.state not in TERMINAL and live and _live(live) != last_live:
                last_live = _live(live)
                out += last_live
            if not out and time.monotonic() - said_at > HEARTBEAT_EVERY_S:
                out = b": still here\n\n"
            if out:
                said_at = time.monotonic()
                yield out
            if standing and standing.state in TERMINAL and after >= standing.last_seq:
                return
            if len(lines) == EVENTS_AT_ONCE:
                woken.set()

    def log(
        self,
        caller: Caller,
        job_id: UUID,
        attempt: int | None,
        so_far: Iterator[bytes],
        position: LogPosition,
    ) -> AsyncIterator[bytes]:
        """A job's log: what there is, then what comes after ``position``, to the job's end.

        Raises: Unavailable, before the first byte.
        """
        self._admit()
        return self._log(caller, job_id, attempt, so_far, position)

    async def _log(
        self,
        caller: Caller,
        job_id: UUID,
        attempt: int | None,
        so_far: Iterator[bytes],
        position: LogPosition,
    ) -> AsyncIterator[bytes]:
        reader = LogReader(self._db, self._store, caller.team_id)
        loop = asyncio.get_running_loop()
        while piece := await loop.run_in_executor(self._readers, next, so_far, b""):
            yield piece
        async for woken in self._changes(job_id):
            found = await self._in_thread(partial(reader.after, job_id, attempt, position))
            if found is None:
                continue
            standing, pieces, position = found
            if pieces:
                yield b"".join(pieces)
                woken.set()  # there may be more
            elif standing.state in TERMINAL:
                return


def _news(
    job_id: UUID, after: int
) -> Callable[[Connection], tuple[reading.Standing, list[EventView], LiveView]]:
    """Where the job stands, its new lines and what runs, all of one moment."""
    return lambda tx: (
        reading.standing(tx, job_id),
        reading.list_events(tx, job_id, after=after, limit=EVENTS_AT_ONCE),
        reading.live_view(tx, job_id),
    )


def _event(line: EventView) -> bytes:
    return f"id: {line.seq}\nevent: {line.type}\ndata: {line.model_dump_json()}\n\n".encode()


def _live(view: LiveView) -> bytes:
    return f"event: progress\ndata: {view.model_dump_json()}\n\n".encode()


class Stream(StreamingResponse):
    """A response without an end in sight; a reader who takes nothing for a while is dropped."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        live = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, headers={**live, **(headers or {})}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(SLOW_READER_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        except TimeoutError:
            log.info("slow reader dropped", extra={"event": "slow_reader", "path": scope["path"]})
