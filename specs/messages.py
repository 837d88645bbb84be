"""What travels over Celery: hints. A hint names a placed attempt; the truth is in Postgres."""

from typing import NamedTuple
from uuid import UUID

PING_TASK = "tuneyard.ping"
"""What a worker sends to itself, to see that its consumer still consumes."""

TRANSPORT = {
    "visibility_timeout": 60,
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "max_connections": 20,
    "global_keyprefix": "ty:",
}
"""kombu's options for the broker. visibility_timeout and global_keyprefix must be equal in all
applications on one broker; without the timeouts a stopped broker blocks for ever."""

HINT_EXPIRES_S = 60


class Hint(NamedTuple):
    """The arguments of an observing task: three scalars, all asked again in Postgres."""

    job: str
    attempt: str
    token: int


def node_queue(node_id: UUID) -> str:
    """The Celery queue that one node consumes."""
    return f"node.{node_id.hex}"


def task_name(kind: str) -> str:
    """The Celery task that observes an attempt of a job of this kind."""
    return f"tuneyard.{kind}"


def task_id(job: str, number: int) -> str:
    """The Celery task's id, so that Flower's tasks can be joined with jobs."""
    return f"{job}.{number}"
