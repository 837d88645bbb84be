"""Where the model of a serve job listens, or why it does not."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from tuneyard.models.nodes import Gateway
from tuneyard.models.reading import no_job
from tuneyard.specs.errors import Conflict, InputError, Unavailable
from tuneyard.specs.ids import show_id
from tuneyard.specs.states import TERMINAL, JobState


class NotReady(Conflict):
    """The model does not listen yet."""

    code = "not_ready"


class Ended(InputError):
    """This job has ended: nothing listens any more."""

    code = "ended"
    http_status = 410


@dataclass(frozen=True)
class Listening:
    """A model that listens: which attempt, and through which node's gateway."""

    attempt: UUID
    number: int
    gateway: Gateway


# Row level security shows the team's jobs and attempts alone.
WHERE_IT_LISTENS = text("""
    SELECT j.kind, j.state, j.wait_reason, a.id AS attempt, a.number, a.phase, a.stop_reason,
        n.gateway_url, n.gateway_token, n.name AS node
    FROM jobs j
    LEFT JOIN attempts a ON a.job_id = j.id AND a.ended_at IS NULL
    LEFT JOIN members m ON m.attempt_id = a.id AND m.rank = 0
    LEFT JOIN nodes n ON n.id = m.node_id
    WHERE j.id = :job
""")


def listening(tx: Connection, job_id: UUID) -> Listening:
    """Where to ask. Raises: NotFound, Conflict (not_serving, not_ready), Ended, Unavailable."""
    row = tx.execute(WHERE_IT_LISTENS, {"job": job_id}).one_or_none()
    if row is None:
        raise no_job()
    shown, state = show_id("job", job_id), JobState(row.state)
    if row.kind != "serve":
        message, hint = f"Job {shown} is a {row.kind} job.", "only a serve job answers questions"
        raise Conflict(message, code="not_serving", field="job", hint=hint)
    if state in TERMINAL:
        hint = "submit a serve job again; `tuneyard chat MODEL` does"
        raise Ended(f"Job {shown} {state}: nothing listens any more.", field="job", hint=hint)
    if state is not JobState.RUNNING or row.phase != "running" or row.stop_reason:
        hint = f"ask again once it is; …/jobs/{shown}/events tells when"
        raise NotReady(f"The model is not ready: {_standing(row)}.", field="job", hint=hint)
    if row.gateway_url is None:
        message = f"Node {row.node} has no gateway."
        hint = "its worker is of an earlier release"
        raise Unavailable(message, code="gateway_away", hint=hint)
    return Listening(row.attempt, row.number, Gateway(row.gateway_url, row.gateway_token))


def _standing(row: Row[Any]) -> str:
    if row.wait_reason:
        return str(row.wait_reason)
    if row.stop_reason or row.phase == "publishing":
        return f"its attempt is being stopped ({row.stop_reason or 'it ended'})"
    if row.attempt is None:
        return f"the job is {row.state}"
    return f"attempt {row.number} is {row.phase}"
