"""What travels over Celery: hints. A hint names a placed attempt; the truth is in Postgres."""

from typing import NamedTuple
from uuid import UUID

TASK_NAMES = {
    "finetune": "tuneyard.finetune",
    "inference": "tuneyard.inference",
    "download": "tuneyard.download",
}
"""Kind of job -> name of the Celery task that observes an attempt of it."""

PING_TASK = "tuneyard.ping"
"""The watchdog's message: a node that misses two of them restarts its consumer."""

HINT_EXPIRES_S = 60


class Hint(NamedTuple):
    """The arguments of an observing task: three scalars, all asked again in Postgres."""

    job: str
    attempt: str
    token: int


def node_queue(node_id: UUID) -> str:
    """The Celery queue that one node consumes."""
    return f"node.{node_id.hex}"


def task_id(job: str, number: int) -> str:
    """The Celery task's id, so that Flower's tasks can be joined with jobs."""
    return f"{job}.{number}"
