"""Watching the consumer: a worker pings itself through the broker.

Celery consumers have been seen to fall silent after a reconnect. Attempts run without them, but
Flower would show nothing. A worker whose pings are sent and never come back ends with its runners
left alone; whoever started it starts it again, and the next one connects to the guards.
"""

import logging
import os
import signal
import threading

from celery import Celery

from tuneyard.specs.messages import PING_TASK

log = logging.getLogger(__name__)

PING_EVERY_S = 30.0
SILENT_AFTER = 3
"""So many pings in a row that were sent and did not come back."""


class ConsumerWatch:
    """Sends pings to this worker's own queue and counts those that did not come back."""

    def __init__(self, app: Celery, queue: str, *, every_s: float = PING_EVERY_S) -> None:
        self._app, self._queue, self._every_s = app, queue, every_s
        self._missing = 0
        self.silent = False
        # Flower lists tasks for people: two pings a minute would push the jobs out of it.
        app.task(name=PING_TASK, send_events=False)(self._came_back)

    def start(self, stopping: threading.Event) -> None:
        """Watch in a thread until the worker stops."""
        threading.Thread(
            target=self._watch, args=(stopping,), name="consumer-watch", daemon=True
        ).start()

    def _came_back(self) -> None:
        self._missing = 0

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(self._every_s):
            if self._missing >= SILENT_AFTER:
                log.warning("consumer is silent, restarting", extra={"event": "consumer_silent"})
                self.silent = True
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if self._sent():
                self._missing += 1

    def _sent(self) -> bool:
        """Whether the broker took a ping; one that is away says nothing about the consumer."""
        try:
            self._app.send_task(
                PING_TASK, queue=self._queue, expires=self._every_s * 2, retry=False
            )
        except Exception:  # any transport's error: the broker is away
            return False
        return True
