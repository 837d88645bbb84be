"""The tables, as SQLAlchemy sees them. alembic/versions makes them; a test holds both together.

Each class says when its rows come and go and who changes them.
"""

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, Computed, Double, Integer, LargeBinary, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import UserDefinedType


class Xid8(UserDefinedType[int]):
    """PostgreSQL's 64-bit transaction id."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return "xid8"


class Row(DeclarativeBase):
    """Base of all tables; Python types stand for PostgreSQL's as mapped here."""

    type_annotation_map: ClassVar = {
        str: Text,
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
        list[int]: ARRAY(Integer),
        bytes: LargeBinary,
        float: Double,
    }


def _key() -> Any:
    return mapped_column(primary_key=True)


def _big(**options: Any) -> Any:
    return mapped_column(BigInteger, **options)


class TransitionRow(Row):
    """A legal move; loaded by migrations from specs/states.py, read by a trigger."""

    __tablename__ = "transitions"
    from_state: Mapped[str] = _key()
    event: Mapped[str] = _key()
    to_state: Mapped[str] = _key()


class ClusterRow(Row):
    """The one row of this cluster; restore_epoch rises when a backup is restored."""

    __tablename__ = "cluster"
    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    restore_epoch: Mapped[int] = _big()


class LeaseRow(Row):
    """Who leads (name ``scheduler``); the epoch rises with each new leader."""

    __tablename__ = "leases"
    name: Mapped[str] = _key()
    holder: Mapped[str]
    epoch: Mapped[int] = _big()
    expires_at: Mapped[datetime]


class TeamRow(Row):
    """A team: the border that no reference crosses."""

    __tablename__ = "teams"
    id: Mapped[UUID] = _key()
    name: Mapped[str]
    created_at: Mapped[datetime]


class ApiKeyRow(Row):
    """A key of a team; only its SHA-256 is kept."""

    __tablename__ = "api_keys"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    name: Mapped[str]
    hash: Mapped[bytes]
    role: Mapped[str]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class FileRow(Row):
    """An uploaded file: uploaded -> processing -> processed | rejected, with a report."""

    __tablename__ = "files"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    name: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = _big()
    sha256: Mapped[str]
    state: Mapped[str]
    report: Mapped[dict[str, Any] | None]
    check_until: Mapped[datetime | None]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class JobRow(Row):
    """A job. The row is the outbox: once committed it will run. ``state`` moves by apply_event."""

    __tablename__ = "jobs"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    kind: Mapped[str]
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    notes: Mapped[list[Any]]
    state: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    demand: Mapped[dict[str, Any]]
    device_kind: Mapped[str] = mapped_column(Computed("demand ->> 'kind'"))
    inputs: Mapped[dict[str, Any]]
    pipeline_id: Mapped[UUID | None]
    retry_of: Mapped[UUID | None]
    system: Mapped[bool]
    work_key: Mapped[str | None]
    not_before: Mapped[datetime | None]
    last_seq: Mapped[int] = _big()
    wait_reason: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class JobEdgeRow(Row):
    """child needs an output of parent."""

    __tablename__ = "job_edges"
    team_id: Mapped[UUID]
    child: Mapped[UUID] = _key()
    parent: Mapped[UUID] = _key()
    output: Mapped[str] = _key()


class NodeRow(Row):
    """A machine with a worker, which writes ``seen_at`` at each renewal."""

    __tablename__ = "nodes"
    id: Mapped[UUID] = _key()
    name: Mapped[str]
    boot_id: Mapped[str]
    state: Mapped[str]
    capabilities: Mapped[dict[str, Any]]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    disk_low: Mapped[bool]
    gateway_url: Mapped[str | None]
    gateway_token: Mapped[str | None]


class NodeCacheRow(Row):
    """Something whole in a node's cache, as its worker says; placing prefers such nodes."""

    __tablename__ = "node_cache"
    node_id: Mapped[UUID] = _key()
    digest: Mapped[str] = _key()
    bytes: Mapped[int] = _big()
    used_at: Mapped[datetime]


class DeviceRow(Row):
    """A GPU by UUID, or a node's cores. Only ``ok`` is placed on.

    cleaning: its attempt ended, memory not yet seen empty; unconfirmed: its lease ran out, the
    node has not yet said that nothing runs; draining: memory stays held; lost: no longer there.
    """

    __tablename__ = "devices"
    id: Mapped[UUID] = _key()
    node_id: Mapped[UUID]
    kind: Mapped[str]
    uuid: Mapped[str]
    name: Mapped[str]
    bytes: Mapped[int] = _big()
    cores: Mapped[list[int]]
    state: Mapped[str]
    state_at: Mapped[datetime]


class SlotRow(Row):
    """What one attempt can hold of a device; retired when the node offers fewer."""

    __tablename__ = "slots"
    id: Mapped[UUID] = _key()
    device_id: Mapped[UUID]
    index: Mapped[int]
    bytes: Mapped[int] = _big()
    cores: Mapped[list[int]]
    retired_at: Mapped[datetime | None]


class AttemptRow(Row):
    """One try at a job. ``token`` is its fence: writers compare it for equality."""

    __tablename__ = "attempts"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    job_id: Mapped[UUID]
    number: Mapped[int]
    token: Mapped[int] = _big()
    phase: Mapped[str]
    outcome: Mapped[str | None]
    charged: Mapped[bool]
    cause: Mapped[str | None]
    evidence: Mapped[str | None]
    patch: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]
    stop_reason: Mapped[str | None]
    stop_asked_at: Mapped[datetime | None]
    events_offset: Mapped[int] = _big()
    log_offset: Mapped[int] = _big()
    log_artifact: Mapped[UUID | None]
    started_at: Mapped[datetime]
    running_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class MemberRow(Row):
    """An attempt's part on one node, with the lease that this node's worker renews."""

    __tablename__ = "members"
    attempt_id: Mapped[UUID] = _key()
    rank: Mapped[int] = _key()
    node_id: Mapped[UUID]
    boot_id: Mapped[str]
    lease_expires_at: Mapped[datetime]
    claimed_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    exit: Mapped[dict[str, Any] | None]


class AllocationRow(Row):
    """A slot in an attempt's hand, until released."""

    __tablename__ = "allocations"
    attempt_id: Mapped[UUID] = _key()
    slot_id: Mapped[UUID] = _key()
    rank: Mapped[int]
    acquired_at: Mapped[datetime]
    released_at: Mapped[datetime | None]


class EventRow(Row):
    """A line of a job's timeline: append-only, numbered without gaps under the job's row lock."""

    __tablename__ = "events"
    job_id: Mapped[UUID] = _key()
    seq: Mapped[int] = _big(primary_key=True)
    team_id: Mapped[UUID]
    attempt_id: Mapped[UUID | None]
    type: Mapped[str]
    from_state: Mapped[str | None]
    to_state: Mapped[str | None]
    at: Mapped[datetime]
    xid: Mapped[int] = mapped_column(Xid8)
    data: Mapped[dict[str, Any]]


class MetricRow(Row):
    """One measured value of an attempt's step; bulk-loaded by the worker."""

    __tablename__ = "metrics"
    attempt_id: Mapped[UUID] = _key()
    name: Mapped[str] = _key()
    step: Mapped[int] = _big(primary_key=True)
    value: Mapped[float]
    team_id: Mapped[UUID]
    at: Mapped[datetime]


class LogChunkRow(Row):
    """Bytes of an attempt's log from ``start`` on; gone once they are one artifact."""

    __tablename__ = "log_chunks"
    attempt_id: Mapped[UUID] = _key()
    seq: Mapped[int] = _big(primary_key=True)
    start: Mapped[int] = _big()
    data: Mapped[bytes]
    team_id: Mapped[UUID]
    at: Mapped[datetime]


class ArtifactRow(Row):
    """A whole folder in the store. pruned_at: no longer offered; swept_at: its files are gone."""

    __tablename__ = "artifacts"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    job_id: Mapped[UUID]
    attempt_id: Mapped[UUID]
    token: Mapped[int] = _big()
    kind: Mapped[str]
    step: Mapped[int | None] = _big()
    bytes: Mapped[int] = _big()
    digest: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    published_at: Mapped[datetime]
    pruned_at: Mapped[datetime | None]
    swept_at: Mapped[datetime | None]


class BaseModelRow(Row):
    """A model that a download job brought; of no team. The newest row of a name counts."""

    __tablename__ = "base_models"
    id: Mapped[UUID] = _key()
    name: Mapped[str]
    source: Mapped[str]
    revision: Mapped[str]
    digest: Mapped[str]
    bytes: Mapped[int] = _big()
    manifest: Mapped[dict[str, Any]]
    published_at: Mapped[datetime]


class ModelRow(Row):
    """A team's tuned model: an adapter over a base or over another model, or a model of its own.

    kind ``adapter`` needs its parent to speak, ``model`` has all in its artifact;
    adapter_artifact_id: what was merged into it.
    """

    __tablename__ = "models"
    id: Mapped[UUID] = _key()
    team_id: Mapped[UUID]
    name: Mapped[str]
    job_id: Mapped[UUID]
    artifact_id: Mapped[UUID]
    base_model_id: Mapped[UUID | None]
    parent_model_id: Mapped[UUID | None]
    created_at: Mapped[datetime]
    kind: Mapped[str]
    adapter_artifact_id: Mapped[UUID | None]


class IdempotencyKeyRow(Row):
    """Which job a key made; written with the job, kept for a day."""

    __tablename__ = "idempotency_keys"
    team_id: Mapped[UUID] = _key()
    key: Mapped[str] = _key()
    body_sha256: Mapped[str]
    job_id: Mapped[UUID]
    expires: Mapped[datetime]
