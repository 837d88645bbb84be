"""The Celery side of a worker: tasks that observe attempts, so that Flower shows what really runs.

A task owns nothing. It asks the supervisor for the attempt that its hint names, waits for its end
and returns or raises its outcome. Without Celery the same attempts run all the same.
"""

import logging
import threading
import time
from typing import Any
from uuid import UUID

from celery import Celery
from celery.exceptions import Ignore
from celery.signals import worker_shutting_down
from kombu.entity import Queue

from tuneyard.specs.errors import BadId
from tuneyard.specs.exits import Outcome
from tuneyard.specs.ids import parse_id, show_id
from tuneyard.specs.jobs import KINDS
from tuneyard.specs.messages import TRANSPORT, node_queue, task_id, task_name
from tuneyard.workers.keeping import Keeper
from tuneyard.workers.supervisor import Supervisor

log = logging.getLogger(__name__)

FIND_WITHIN_S = 10.0
"""A hint may come before this node's look has found the attempt."""


class AttemptFailed(Exception):
    """The observed attempt did not succeed; Flower shows why."""


def celery_app(broker_url: str, node_id: UUID) -> Celery:
    """The worker's Celery application, consuming one node's queue."""
    app = Celery("tuneyard", broker=broker_url)
    queue = node_queue(node_id)
    app.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options=TRANSPORT
        | {"retry_on_timeout": True, "unacked_restore_interval": 5},
        task_acks_late=False,
        task_default_queue=queue,
        task_ignore_result=True,
        task_queues=[Queue(queue)],
        task_reject_on_worker_lost=False,
        task_serializer="json",
        task_track_started=True,
        worker_disable_prefetch=True,
        worker_enable_remote_control=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
    )
    return app


class Observers:
    """The tasks of one worker, and which attempts they watch."""

    def __init__(self, app: Celery, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._watched: set[UUID] = set()
        self._observed: set[UUID] = set()
        self._lock = threading.Lock()
        for kind in KINDS:
            app.task(name=task_name(kind), throws=(AttemptFailed,))(self.observe)
        self._app, self._hostname = app, hostname_of(supervisor)
        supervisor.on_end = self.report_unobserved
        worker_shutting_down.connect(self._on_shutdown, weak=False)

    def _on_shutdown(self, **_: Any) -> None:
        """On SIGTERM all observers return at once: the attempts are not theirs."""
        self._supervisor.stopping.set()

    def observe(self, job: str, attempt: str, token: int) -> str:
        """Watch the attempt that a hint names to its end. The hint is checked, never believed."""
        keeper = self._find(attempt)
        if keeper is None or keeper.ref.token != token:
            log.info("hint ignored", extra={"event": "hint_ignored", "job": str(job)[:80]})
            raise Ignore()
        with self._lock:
            if keeper.ref.id in self._watched:
                raise Ignore()
            self._watched.add(keeper.ref.id)
            self._observed.add(keeper.ref.id)
        try:
            return self._watch(keeper)
        finally:
            with self._lock:
                self._watched.discard(keeper.ref.id)

    def report_unobserved(self, keeper: Keeper) -> None:
        """Tell Flower how an attempt ended that no task here has watched to its end.

        Its observer may have died with an earlier worker, and Flower would show it as running for
        ever. In a thread of its own, because the broker may be away.
        """
        with self._lock:
            if keeper.ref.id in self._observed:
                self._observed.discard(keeper.ref.id)
                return
        threading.Thread(target=self._send_end, args=(keeper,), daemon=True).start()

    def _send_end(self, keeper: Keeper) -> None:
        uuid = task_id(show_id("job", keeper.ref.job_id), keeper.ref.number)
        failure = failure_of(keeper)
        try:
            with (
                self._app.connection_for_write() as connection,
                self._app.events.Dispatcher(connection, hostname=self._hostname) as dispatcher,
            ):
                if failure is None:
                    dispatcher.send("task-succeeded", uuid=uuid, result="'ended'", runtime=0)
                else:
                    dispatcher.send("task-failed", uuid=uuid, exception=failure, traceback="")
        except Exception as error:  # any transport's: Flower shows what it can
            log.debug("end not shown", extra={"event": "end_not_shown", "error": str(error)})

    def _find(self, attempt: str) -> Keeper | None:
        try:
            attempt_id = parse_id("attempt", str(attempt))
        except BadId:
            return None
        self._supervisor.wake()
        give_up_at = time.monotonic() + FIND_WITHIN_S
        while time.monotonic() < give_up_at and not self._supervisor.stopping.is_set():
            keeper = self._supervisor.keeper_of(attempt_id)
            if keeper is not None:
                return keeper
            time.sleep(0.05)
        return None

    def _watch(self, keeper: Keeper) -> str:
        while not keeper.done.wait(0.5):
            if self._supervisor.stopping.is_set():
                return "the worker stops; the attempt goes on or is stopped by its supervisor"
        failure = failure_of(keeper)
        if failure is not None:
            raise AttemptFailed(failure)
        return str(keeper.verdict.outcome) if keeper.verdict else ""


def hostname_of(supervisor: Supervisor) -> str:
    """The worker's name in Flower; an event in another's name would show there as a worker."""
    return f"worker@{supervisor.name}"


def failure_of(keeper: Keeper) -> str | None:
    """What Flower shows as a failure; None for an attempt that succeeded or was asked to stop."""
    verdict = keeper.verdict
    if verdict is None:
        return "lost"
    if verdict.outcome in (Outcome.FAILED, Outcome.LOST):
        return f"{verdict.outcome}: {verdict.cause}"
    return None
