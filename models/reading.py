"""What the API reads about jobs, as the forms that it answers.

Every function sees the rows of the transaction's team alone: row level security does that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select, text

from tuneyard.models.inputs import show_input
from tuneyard.models.tables import ArtifactRow, AttemptRow, EventRow, JobRow, ModelRow
from tuneyard.specs.errors import NotFound
from tuneyard.specs.ids import show_id
from tuneyard.specs.states import LIVE, JobState, allowed_actions
from tuneyard.specs.views import (
    ArtifactView,
    AttemptView,
    ErrorView,
    EventView,
    JobView,
    LiveView,
    MetricPoint,
    PipelineView,
    ProgressView,
    SamplePoint,
)


def no_job() -> NotFound:
    """What an unknown id, another team's and one of a wrong form are all answered with."""
    return NotFound("There is no such job here.", field="job")


def no_artifact() -> NotFound:
    """The same for artifacts."""
    return NotFound("There is no such artifact here.", field="artifact")


@dataclass(frozen=True)
class JobFilter:
    """Which jobs are asked for; empty means all."""

    states: Sequence[JobState] = ()
    kind: str | None = None
    name: str | None = None
    system: bool | None = False  # None: both


def list_jobs(
    tx: Connection, team: str, wanted: JobFilter, *, before: UUID | None, limit: int
) -> list[JobView]:
    """The newest jobs that are older than ``before``, newest first."""
    query = select(JobRow.__table__).order_by(JobRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(JobRow.id < before)
    if wanted.states:
        query = query.where(JobRow.state.in_([state.value for state in wanted.states]))
    if wanted.kind is not None:
        query = query.where(JobRow.kind == wanted.kind)
    if wanted.system is not None:
        query = query.where(JobRow.system.is_(wanted.system))
    if wanted.name is not None:
        query = query.where(JobRow.name == wanted.name)
    return _views(tx, team, tx.execute(query).all())


def show_job(tx: Connection, team: str, job_id: UUID) -> JobView:
    """One job. Raises: NotFound."""
    rows = tx.execute(select(JobRow.__table__).where(JobRow.id == job_id)).all()
    if not rows:
        raise no_job()
    return _views(tx, team, rows)[0]


def pipeline_of(tx: Connection, job_id: UUID) -> UUID:
    """The pipeline that a job is a step of."""
    row = select(JobRow.pipeline_id).where(JobRow.id == job_id, JobRow.pipeline_id.is_not(None))
    found: UUID = tx.execute(row).scalars().one()  # type: ignore[assignment]  # as is asked for
    return found


def show_pipeline(tx: Connection, team: str, pipeline_id: UUID) -> PipelineView:
    """A pipeline's jobs in the order of their needs. Raises: NotFound."""
    steps = select(JobRow.__table__).where(JobRow.pipeline_id == pipeline_id).order_by(JobRow.id)
    rows = tx.execute(steps).all()
    if not rows:
        raise NotFound("There is no such pipeline here.", field="pipeline")
    return PipelineView(id=show_id("pipeline", pipeline_id), jobs=_views(tx, team, rows))


def _views(tx: Connection, team: str, rows: Sequence[Row[Any]]) -> list[JobView]:
    ids = [row.id for row in rows]
    attempts = _attempts(tx, ids)
    tuned = select(ModelRow.job_id, ModelRow.name).where(ModelRow.job_id.in_(ids))
    models = {row.job_id: row.name for row in tx.execute(tuned)}
    return [_view(team, row, attempts.get(row.id, []), models.get(row.id)) for row in rows]


def _view(team: str, row: Row[Any], attempts: Sequence[Row[Any]], model: str | None) -> JobView:
    state = JobState(row.state)
    return JobView(
        id=show_id("job", row.id),
        kind=row.kind,
        name=row.name,
        state=state.value,
        team=team,
        created_at=row.created_at,
        finished_at=row.finished_at,
        wait_reason=row.wait_reason,
        progress=_progress(attempts[-1], state) if attempts else None,
        attempts=[_attempt_view(attempt) for attempt in attempts],
        error=ErrorView.model_validate(row.error) if row.error else None,
        spec=row.spec,
        notes=row.notes,
        priority=row.priority,
        device=row.device_kind,
        demand=row.demand,
        inputs=_shown_inputs(row.inputs),
        pipeline=show_id("pipeline", row.pipeline_id) if row.pipeline_id else None,
        retry_of=show_id("job", row.retry_of) if row.retry_of else None,
        system=row.system,
        allowed_actions=allowed_actions(state),
        model=model,
    )


def _shown_inputs(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {field: show_input(value) for field, value in inputs.items()}


def _progress(attempt: Row[Any], state: JobState) -> ProgressView | None:
    """The newest attempt's progress; a job that does not run has no time left to tell.

    One that is queued again begins anew: what its last attempt had reached is over.
    """
    if not attempt.progress or state is JobState.QUEUED:
        return None
    progress = ProgressView.model_validate(attempt.progress)
    return progress if state in LIVE else progress.model_copy(update={"eta_s": None})


ATTEMPTS = text("""
    SELECT a.*, n.name AS node,
        (SELECT array_agg(DISTINCT d.uuid ORDER BY d.uuid)
         FROM allocations l JOIN slots s ON s.id = l.slot_id JOIN devices d ON d.id = s.device_id
         WHERE l.attempt_id = a.id) AS devices
    FROM attempts a
    LEFT JOIN members m ON m.attempt_id = a.id AND m.rank = 0
    LEFT JOIN nodes n ON n.id = m.node_id
    WHERE a.job_id = ANY (:jobs)
    ORDER BY a.job_id, a.number
""")


def _attempts(tx: Connection, job_ids: Sequence[UUID]) -> dict[UUID, list[Row[Any]]]:
    """Each job's attempts, oldest first."""
    by_job: dict[UUID, list[Row[Any]]] = {}
    if job_ids:
        for row in tx.execute(ATTEMPTS, {"jobs": list(job_ids)}):
            by_job.setdefault(row.job_id, []).append(row)
    return by_job


def _attempt_view(row: Row[Any]) -> AttemptView:
    return AttemptView(
        number=row.number,
        phase=row.phase,
        outcome=row.outcome,
        charged=row.charged,
        cause=row.cause,
        evidence=row.evidence,
        patch=row.patch,
        stop_reason=row.stop_reason,
        node=row.node,
        devices=row.devices or [],
        started_at=row.started_at,
        running_at=row.running_at,
        ended_at=row.ended_at,
    )


@dataclass(frozen=True)
class Standing:
    """How far a job's timeline goes, and whether it is over."""

    state: JobState
    last_seq: int


def standing(tx: Connection, job_id: UUID) -> Standing:
    """Where a job stands. Raises: NotFound."""
    query = select(JobRow.state, JobRow.last_seq).where(JobRow.id == job_id)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise no_job()
    return Standing(JobState(row.state), row.last_seq)


def list_events(tx: Connection, job_id: UUID, *, after: int, limit: int) -> list[EventView]:
    """The lines of a job's timeline after a number, oldest first."""
    rows = tx.execute(
        select(EventRow.__table__, AttemptRow.number)
        .outerjoin(AttemptRow, AttemptRow.id == EventRow.attempt_id)
        .where(EventRow.job_id == job_id, EventRow.seq > after)
        .order_by(EventRow.seq)
        .limit(limit)
    )
    return [
        EventView(
            seq=row.seq,
            type=row.type,
            from_state=row.from_state,
            to_state=row.to_state,
            attempt=row.number,
            at=row.at,
            data=row.data,
        )
        for row in rows
    ]


# The newest value of each metric. A plain DISTINCT ON would read every row of a long training;
# this walks the primary key (attempt, name, step) from name to name.
NEWEST_METRICS = text("""
    WITH RECURSIVE names AS (
        (SELECT name FROM metrics WHERE attempt_id = :attempt ORDER BY name LIMIT 1)
        UNION ALL
        SELECT (SELECT m.name FROM metrics m
                WHERE m.attempt_id = :attempt AND m.name > names.name ORDER BY m.name LIMIT 1)
        FROM names WHERE names.name IS NOT NULL
    )
    SELECT names.name, newest.step, newest.value
    FROM names, LATERAL (
        SELECT step, value FROM metrics m
        WHERE m.attempt_id = :attempt AND m.name = names.name ORDER BY step DESC LIMIT 1
    ) newest
    WHERE names.name IS NOT NULL
""")


def live_view(tx: Connection, job_id: UUID) -> LiveView:
    """What changes while a job runs, between the lines of its timeline. Raises: NotFound."""
    job = tx.execute(
        select(JobRow.state, JobRow.wait_reason).where(JobRow.id == job_id)
    ).one_or_none()
    if job is None:
        raise no_job()
    newest_first = (
        select(AttemptRow.__table__)
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.number.desc())
    )
    attempt = tx.execute(newest_first.limit(1)).one_or_none()
    if attempt is None or job.state == JobState.QUEUED:
        return LiveView(state=job.state, wait_reason=job.wait_reason)
    newest = tx.execute(NEWEST_METRICS, {"attempt": attempt.id}).all()
    return LiveView(
        state=job.state,
        attempt=attempt.number,
        phase=attempt.phase,
        started_at=attempt.started_at,
        progress=_progress(attempt, JobState(job.state)),
        step=max((row.step for row in newest), default=None),
        metrics={row.name: row.value for row in newest},
        wait_reason=job.wait_reason,
    )


@dataclass(frozen=True)
class MetricFilter:
    """Which metrics are asked for; empty means all."""

    names: Sequence[str] = ()
    attempt: int | None = None


# One series over all attempts: a step that was done again counts as the newest attempt did it.
METRICS = text("""
    WITH points AS (
        SELECT DISTINCT ON (m.step, m.name) m.step, m.name, m.value, a.number
        FROM metrics m JOIN attempts a ON a.id = m.attempt_id
        WHERE a.job_id = :job AND m.step > :after
          AND (CAST(:attempt AS integer) IS NULL OR a.number = :attempt)
          AND (cardinality(CAST(:names AS text[])) = 0 OR m.name = ANY (:names))
        ORDER BY m.step, m.name, a.number DESC
    )
    SELECT step, max(number) AS attempt, jsonb_object_agg(name, CASE
        WHEN value IN ('NaN', 'Infinity', '-Infinity') THEN NULL ELSE value END) AS values
    FROM points GROUP BY step ORDER BY step LIMIT :limit
""")


def list_metrics(
    tx: Connection, job_id: UUID, wanted: MetricFilter, *, after: int, limit: int
) -> list[MetricPoint]:
    """A job's metrics by step; values that are not finite are null."""
    values = {"job": job_id, "attempt": wanted.attempt, "names": list(wanted.names)}
    rows = tx.execute(METRICS, values | {"after": after, "limit": limit})
    return [MetricPoint(step=r.step, attempt=r.attempt, values=r.values) for r in rows]


# As with metrics, a step that was done again counts as the newest attempt did it.
SAMPLES = text("""
    WITH told AS (
        SELECT CAST(e.data ->> 'step' AS bigint) AS step, e.data ->> 'prompt' AS prompt,
               e.data ->> 'text' AS said, e.seq, a.number
        FROM events e JOIN attempts a ON a.id = e.attempt_id
        WHERE e.job_id = :job AND e.type = 'sample'
    ), newest AS (
        SELECT DISTINCT ON (step, prompt) step, prompt, said, seq, number
        FROM told WHERE step > :after ORDER BY step, prompt, number DESC, seq DESC
    )
    SELECT step, max(number) AS attempt,
           jsonb_agg(jsonb_build_object('prompt', prompt, 'text', said) ORDER BY seq) AS answers
    FROM newest GROUP BY step ORDER BY step LIMIT :limit
""")


def list_samples(tx: Connection, job_id: UUID, *, after: int, limit: int) -> list[SamplePoint]:
    """What a job's model said on the way, by step."""
    rows = tx.execute(SAMPLES, {"job": job_id, "after": after, "limit": limit})
    return [SamplePoint(step=r.step, attempt=r.attempt, answers=r.answers) for r in rows]


def list_artifacts(tx: Connection, job_id: UUID, *, kind: str | None = None) -> list[ArtifactView]:
    """What a job brought forth, newest first; its logs only when they are asked for."""
    wanted = ArtifactRow.kind != "log" if kind is None else ArtifactRow.kind == kind
    rows = tx.execute(
        select(ArtifactRow.__table__, AttemptRow.number)
        .join(AttemptRow, AttemptRow.id == ArtifactRow.attempt_id)
        .where(ArtifactRow.job_id == job_id, ArtifactRow.pruned_at.is_(None), wanted)
        .order_by(ArtifactRow.id.desc())
    )
    return [
        ArtifactView(
            id=show_id("artifact", row.id),
            job=show_id("job", row.job_id),
            kind=row.kind,
            step=row.step,
            bytes=row.bytes,
            digest=row.digest,
            attempt=row.number,
            published_at=row.published_at,
        )
        for row in rows
    ]


def manifest_of(tx: Connection, job_id: UUID, artifact_id: UUID) -> Mapping[str, Any]:
    """The manifest of one artifact of a job. Raises: NotFound."""
    manifest = tx.execute(
        select(ArtifactRow.manifest)
        .where(ArtifactRow.id == artifact_id, ArtifactRow.job_id == job_id)
        .where(ArtifactRow.pruned_at.is_(None))
    ).scalar_one_or_none()
    if manifest is None:
        raise no_artifact()
    found: Mapping[str, Any] = manifest
    return found
