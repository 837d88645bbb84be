"""A worker's watch over its own consumer, through a real broker."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from support.yards import wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.placements import Placed
from tuneyard.scheduler.hints import HintPublisher
from tuneyard.specs.ids import new_id
from tuneyard.specs.jobs import KINDS
from tuneyard.specs.messages import node_queue, task_name
from tuneyard.workers.observing import celery_app
from tuneyard.workers.watching import ConsumerWatch


@contextmanager
def listening(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """What a Flower would hear of tasks."""
    heard: list[dict[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-received": heard.append})
        began = threading.Event()

        def listen() -> None:
            began.set()
            list(receiver.itercapture(limit=None, timeout=None, wakeup=False))

        thread = threading.Thread(target=listen)
        thread.start()
        assert began.wait(10)
        try:
            yield heard
        finally:
            receiver.should_stop = True
            thread.join(20)


def test_pings_come_back_and_do_not_show_among_flowers_tasks(valkey: RunningValkey) -> None:
    node = new_id()
    app = celery_app(valkey.url, node)
    returned = threading.Event()

    class Watch(ConsumerWatch):
        def _came_back(self) -> None:
            returned.set()

    def shown() -> None:
        pass

    watch = Watch(app, node_queue(node))
    app.task(name="shown")(shown)
    with (
        listening(app) as heard,
        start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=20.0),
    ):
        assert watch._sent()
        assert returned.wait(20)
        app.send_task("shown", queue=node_queue(node))
        wait_for(lambda: heard, within_s=20, what="the event of the other task")
        assert {event["name"] for event in heard} == {"shown"}


def test_a_hint_of_every_kind_of_job_reaches_its_node(
    valkey: RunningValkey, caplog: pytest.LogCaptureFixture
) -> None:
    node, publisher = new_id(), HintPublisher(valkey.url)
    for kind in KINDS:
        ref = AttemptRef(new_id(), new_id(), new_id(), 1, 1)
        publisher.send(Placed(ref, kind, "a job", node, ("cpu",)))
    publisher.close()
    app = celery_app(valkey.url, node)
    with app.connection_for_read() as connection:
        waiting = connection.SimpleQueue(node_queue(node))
        names = [waiting.get(timeout=5).headers["task"] for _ in KINDS]
    assert names == [task_name(kind) for kind in KINDS]
    assert "unreachable" not in caplog.text
