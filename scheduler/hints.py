"""Publishing hints: after the commit, in a thread of its own, bounded in time, never trusted.

A publish that failed may have happened; one that succeeded may be lost. Workers ask Postgres too,
so nothing but a second of latency depends on this module.
"""

import logging
import queue
import threading
from collections.abc import Callable

from celery import Celery

from tuneyard.models.attempts import AttemptRef
from tuneyard.models.placements import Placed
from tuneyard.specs.ids import show_id
from tuneyard.specs.messages import (
    HINT_EXPIRES_S,
    TRANSPORT,
    Hint,
    node_queue,
    task_id,
    task_name,
)

log = logging.getLogger(__name__)

PUBLISH_TIMEOUT_S = 1.0


class HintPublisher:
    """A thread that sends hints; ``send`` never waits."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("tuneyard-scheduler", broker=broker_url)
        self._app.conf.update(
            broker_transport_options=TRANSPORT
            | {"socket_timeout": PUBLISH_TIMEOUT_S, "socket_connect_timeout": PUBLISH_TIMEOUT_S},
            broker_connection_timeout=PUBLISH_TIMEOUT_S,
            task_serializer="json",
            task_ignore_result=True,
            task_create_missing_queues=True,
            task_send_sent_event=True,
            task_publish_retry=False,
        )
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
        self._reachable = True
        self._thread.start()

    def send(self, placed: Placed) -> None:
        """Hint at a placement."""
        self._put(lambda: self._publish(placed))

    def report_lost(self, ref: AttemptRef) -> None:
        """Tell Flower of an attempt that ended without its observer."""
        self._put(lambda: report_lost(self._app, ref))

    def _put(self, publish: Callable[[], None]) -> None:
        """When too many wait already this one is dropped, as any hint may be."""
        try:
            self._waiting.put_nowait(publish)
        except queue.Full:
            pass

    def close(self) -> None:
        """Send what waits, for at most a second."""
        self._waiting.put(None)
        self._thread.join(timeout=PUBLISH_TIMEOUT_S)

    def _run(self) -> None:
        while (publish := self._waiting.get()) is not None:
            self._attempt(publish)

    def _attempt(self, publish: Callable[[], None]) -> None:
        """Publish; say once, not each second, that the broker is away, and once that it is back."""
        try:
            publish()
        except Exception as error:  # any transport's error: the hint is lost, the job is not
            if self._reachable:
                log.warning(
                    "broker unreachable, workers find their jobs by asking Postgres",
                    extra={"event": "broker_unreachable", "error": str(error)},
                )
            self._reachable = False
            return
        if not self._reachable:
            log.warning("broker reachable again", extra={"event": "broker_reachable"})
        self._reachable = True

    def _publish(self, placed: Placed) -> None:
        job = show_id("job", placed.ref.job_id)
        hint = Hint(job, show_id("attempt", placed.ref.id), placed.ref.token)
        self._app.send_task(
            task_name(placed.kind),
            args=list(hint),
            task_id=task_id(job, placed.ref.number),
            queue=node_queue(placed.node_id),
            expires=HINT_EXPIRES_S,
            retry=False,
            argsrepr=f"({placed.name!r}, team={placed.ref.team_id.hex[-6:]},"
            f" devices={', '.join(placed.device_uuids)})",
        )


def report_lost(app: Celery, ref: AttemptRef) -> None:
    """Send the event that an observer would have sent: it is gone, and Flower would wait."""
    uuid = task_id(show_id("job", ref.job_id), ref.number)
    with (
        app.connection_for_write() as connection,
        app.events.Dispatcher(connection, hostname="tuneyard") as dispatcher,
    ):
        dispatcher.send("task-failed", uuid=uuid, exception="lost: its lease ran out", traceback="")
