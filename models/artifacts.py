"""Whole folders in the store, recorded by the attempt that made them: recorded = complete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from tuneyard.models.attempts import AttemptRef, check_token
from tuneyard.models.events import lock_job, record_event
from tuneyard.models.tables import (
    ArtifactRow,
    AttemptRow,
    BaseModelRow,
    FileRow,
    JobRow,
    ModelRow,
)
from tuneyard.specs.errors import Conflict
from tuneyard.specs.fields import model_name_of
from tuneyard.specs.ids import new_id, show_id
from tuneyard.specs.runner import KEPT_CHECKPOINTS
from tuneyard.specs.sources import same_origin


@dataclass(frozen=True)
class StoredFolder:
    """A folder that stands whole in the store under its id."""

    id: UUID
    kind: str
    manifest: Mapping[str, Any]
    digest: str  # sha256 of the manifest
    bytes: int
    step: int | None = None


def record_checkpoint(tx: Connection, ref: AttemptRef, folder: StoredFolder) -> None:
    """Record a stored checkpoint and let older ones go. Raises: StaleToken."""
    lock_job(tx, ref.job_id)
    check_token(tx, ref)
    if not _insert(tx, ref, folder):
        return
    data = {"step": folder.step, "artifact": show_id("artifact", folder.id)}
    record_event(tx, ref.job_id, "checkpoint", attempt_id=ref.id, data=data)
    _prune_checkpoints(tx, ref.job_id)


def artifact_values(ref: AttemptRef, folder: StoredFolder) -> dict[str, Any]:
    """The columns of a folder that an attempt stored."""
    return {
        "id": folder.id,
        "team_id": ref.team_id,
        "job_id": ref.job_id,
        "attempt_id": ref.id,
        "token": ref.token,
        "kind": folder.kind,
        "step": folder.step,
        "bytes": folder.bytes,
        "digest": folder.digest,
        "manifest": dict(folder.manifest),
    }


def _insert(tx: Connection, ref: AttemptRef, folder: StoredFolder) -> bool:
    """Record a folder; False when it is recorded already."""
    row = insert(ArtifactRow).values(**artifact_values(ref, folder))
    new = row.on_conflict_do_nothing(index_elements=["id"]).returning(ArtifactRow.id)
    return tx.execute(new).one_or_none() is not None


RANK = func.coalesce(
    ArtifactRow.manifest["rank"].as_float(), ArtifactRow.manifest["eval_loss"].as_float()
)
"""What checkpoints are compared by, where they were measured: less is better."""


def _prune_checkpoints(tx: Connection, job_id: UUID) -> None:
    """Mark all but the newest (save_total_limit, or two) and the best; files are swept later."""
    limit = tx.execute(
        select(JobRow.spec["save_total_limit"].as_integer()).where(JobRow.id == job_id)
    ).scalar_one()
    rows = tx.execute(
        select(ArtifactRow.id, RANK.label("rank"))
        .where(ArtifactRow.job_id == job_id, ArtifactRow.kind == "checkpoint")
        .where(ArtifactRow.pruned_at.is_(None))
        .order_by(ArtifactRow.step.desc(), ArtifactRow.id.desc())
    ).all()
    kept = {row.id for row in rows[: limit or KEPT_CHECKPOINTS]}
    measured = [row for row in reversed(rows) if row.rank is not None]
    if measured:
        kept.add(min(measured, key=lambda row: row.rank).id)  # of equal ones the first
    pruned = [row.id for row in rows if row.id not in kept]
    if pruned:
        tx.execute(
            update(ArtifactRow)
            .where(ArtifactRow.id.in_(pruned))
            .values(pruned_at=func.clock_timestamp())
        )


@dataclass(frozen=True)
class KeptCheckpoint:
    """A recorded checkpoint that an attempt may go on from."""

    id: UUID
    step: int
    digest: str


# A retry goes on from what its origin left, or that one's origin, up to one that began anew.
TO_RESUME = text("""
    WITH RECURSIVE line AS (
        SELECT id, retry_of, spec, 0 AS back FROM jobs WHERE id = :job
        UNION ALL
        SELECT j.id, j.retry_of, j.spec, line.back + 1
        FROM line JOIN jobs j ON j.id = line.retry_of
        WHERE NOT coalesce(CAST(line.spec ->> 'from_scratch' AS boolean), false)
          AND line.back < 100
    )
    SELECT a.id, a.step, a.digest FROM line JOIN artifacts a ON a.job_id = line.id
    WHERE a.kind = 'checkpoint' AND a.pruned_at IS NULL
    ORDER BY line.back, a.step DESC, a.id DESC
""")


def checkpoints_to_resume(tx: Connection, job_id: UUID) -> list[KeptCheckpoint]:
    """A job's recorded checkpoints, newest first; a retry's follow with those of its origins."""
    rows = tx.execute(TO_RESUME, {"job": job_id})
    return [KeptCheckpoint(row.id, row.step, row.digest) for row in rows]


def publish_outputs(tx: Connection, ref: AttemptRef, folders: list[StoredFolder]) -> None:
    """Record what a successful attempt brought forth, in the transaction that ends it.

    The attempt's row is held and live: the caller ends it next.
    """
    for folder in folders:
        _insert(tx, ref, folder)
        if folder.kind in ("adapter", "model"):
            _insert_model(tx, ref, folder)


def _insert_model(tx: Connection, ref: AttemptRef, folder: StoredFolder) -> None:
    """Name the model as it was asked, or as its job; a name that is taken gets the job's id."""
    asked = JobRow.spec["model_name"].astext.label("asked")
    job = tx.execute(select(JobRow.name, JobRow.inputs, asked).where(JobRow.id == ref.job_id)).one()
    wanted, whole = job.asked or model_name_of(job.name) or "tuned", folder.kind == "model"
    row = insert(ModelRow).values(
        id=new_id(),
        team_id=ref.team_id,
        job_id=ref.job_id,
        artifact_id=folder.id,
        kind=folder.kind,
        adapter_artifact_id=job.inputs.get("adapter", {}).get("artifact") if whole else None,
        **_parent(tx, job.inputs["model"]),
    )
    for name in (wanted, f"{wanted}-{ref.job_id.hex[-12:]}"):
        named = row.values(name=name).on_conflict_do_nothing(constraint="models_name_once")
        if tx.execute(named.returning(ModelRow.id)).one_or_none() is not None:
            return


def _parent(tx: Connection, model: Mapping[str, str]) -> dict[str, UUID]:
    """What a tuned model was made of: a base model, or a model that the team made."""
    if "base_model" in model:
        return {"base_model_id": UUID(model["base_model"])}
    by = ModelRow.artifact_id == UUID(model["artifact"])
    return {"parent_model_id": tx.execute(select(ModelRow.id).where(by)).scalar_one()}


def check_base_name(tx: Connection, name: str, source: str) -> None:
    """Refuse a name that all teams know as a base model from another source.

    Raises: Conflict name_taken.
    """
    by = select(BaseModelRow.source).where(BaseModelRow.name == name)
    sources = tx.execute(by).scalars().all()
    if not sources or any(same_origin(source, each) for each in sources):
        return
    raise Conflict(
        f"{name[:80]!r} is a base model from another source.",
        code="name_taken",
        field="model_name",
        hint="choose another model_name",
    )


def recorded_base_model(tx: Connection, job_id: UUID, digest: str) -> UUID | None:
    """Under which id these bytes are recorded by the name that a download gives them, if any."""
    name = select(JobRow.spec["model_name"].astext).where(JobRow.id == job_id).scalar_subquery()
    by = select(BaseModelRow.id).where(BaseModelRow.name == name, BaseModelRow.digest == digest)
    return tx.execute(by).scalar_one_or_none()


def publish_base_model(tx: Connection, name: str, folder: StoredFolder) -> None:
    """Record a downloaded model; the same bytes under the same name are recorded once.

    Of two sources that bring one name at once the second waits here, and is refused.
    Raises: Conflict name_taken.
    """
    manifest = dict(folder.manifest)
    tx.execute(
        select(func.pg_advisory_xact_lock(func.hashtext("base_models"), func.hashtext(name)))
    )
    check_base_name(tx, name, str(manifest.get("source", "")))
    row = insert(BaseModelRow).values(
        id=folder.id,
        name=name,
        source=str(manifest.get("source", "")),
        revision=str(manifest.get("revision", "")),
        digest=folder.digest,
        bytes=folder.bytes,
        manifest=manifest,
    )
    tx.execute(
        row.on_conflict_do_update(
            index_elements=["name", "digest"], set_={"published_at": func.clock_timestamp()}
        )
    )


def forget_work(tx: Connection, artifact_id: UUID | None) -> None:
    """What a system job made cannot be had any more: whoever wants it next has it made anew."""
    maker = select(ArtifactRow.job_id).where(ArtifactRow.id == artifact_id).scalar_subquery()
    tx.execute(update(JobRow).where(JobRow.system, JobRow.id == maker).values(work_key=None))


def artifacts_to_sweep(tx: Connection, *, limit: int = 50) -> list[UUID]:
    """Artifacts that are marked and whose files are still there, but none that is being read.

    While an attempt of the job is staging, it may just be copying a checkpoint.
    """
    rows = tx.execute(
        select(ArtifactRow.id)
        .where(
            ArtifactRow.pruned_at < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 1)
        )
        .where(ArtifactRow.swept_at.is_(None))
        .where(
            ~select(AttemptRow.id)
            .where(AttemptRow.job_id == ArtifactRow.job_id)
            .where(AttemptRow.ended_at.is_(None), AttemptRow.phase == "staging")
            .exists()
        )
        .limit(limit)
    )
    return list(rows.scalars())


PLACES = {
    # Rows that keep what the store holds under their id.
    "artifacts": select(ArtifactRow.id).where(ArtifactRow.swept_at.is_(None)),
    "models": select(BaseModelRow.id),
    "files": select(FileRow.id).where(FileRow.deleted_at.is_(None)),
}


def unrecorded(tx: Connection, place: str, ids: Sequence[UUID]) -> list[UUID]:
    """Which of these ids in a place of the store no row keeps."""
    rows = PLACES[place]
    (column,) = rows.selected_columns
    kept = set(tx.execute(rows.where(column.in_(ids))).scalars())
    return [each for each in ids if each not in kept]


def oldest_live_attempt_s(tx: Connection) -> float | None:
    """For how many seconds the oldest live attempt lives; None when none does."""
    age = func.extract("epoch", func.clock_timestamp() - func.min(AttemptRow.started_at))
    found = tx.execute(select(age).where(AttemptRow.ended_at.is_(None))).scalar_one()
    return None if found is None else float(found)


def mark_swept(tx: Connection, artifact_ids: list[UUID]) -> None:
    """The files of these artifacts are gone from the store."""
    tx.execute(
        update(ArtifactRow)
        .where(ArtifactRow.id.in_(artifact_ids))
        .values(swept_at=func.clock_timestamp())
    )
