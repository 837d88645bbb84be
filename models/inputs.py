"""From what a spec names (ids, names, other jobs) to the artifacts and files that a runner gets.

``jobs.inputs`` maps each field to what it became, written when the job leaves ``blocked``:

    {"model": {"base_model": uuid}, "adapter": {"artifact": uuid}, "dataset": {"file": uuid}}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from tuneyard.models.tables import ArtifactRow, BaseModelRow, FileRow, JobRow, ModelRow
from tuneyard.specs.errors import InputError, NotFound
from tuneyard.specs.ids import is_id, parse_id, show_id
from tuneyard.specs.jobs import Reference
from tuneyard.specs.states import TERMINAL, JobState

OUTPUTS = {"download": "base_model", "finetune": "adapter", "inference": "results"}
"""Kind of job -> kind of what it brings forth."""


@dataclass(frozen=True)
class Resolved:
    """What references came to: inputs that are there, and jobs or files that they wait for."""

    inputs: Mapping[str, dict[str, str]]
    parents: Sequence[tuple[UUID, str]] = ()  # (job, output)
    files: Sequence[UUID] = ()

    @property
    def ready(self) -> bool:
        """Whether nothing is waited for."""
        return not self.parents and not self.files

    @property
    def wait_reason(self) -> str | None:
        """What is waited for, in a sentence for the job's owner; None when all is there."""
        awaited = [f"{show_id('job', job)} ({output})" for job, output in self.parents]
        awaited += [f"the check of {show_id('file', file)}" for file in self.files]
        return f"waits for {', '.join(dict.fromkeys(awaited))}" if awaited else None


def resolve(tx: Connection, references: Sequence[Reference]) -> Resolved:
    """Look up all references of a spec. Raises: InputError that names the field and the mend."""
    inputs: dict[str, dict[str, str]] = {}
    parents: list[tuple[UUID, str]] = []
    files: list[UUID] = []
    for reference in references:
        found = _resolve_one(tx, reference)
        inputs |= found.inputs
        parents += found.parents
        files += found.files
    return Resolved(inputs, parents, files)


def _resolve_one(tx: Connection, reference: Reference) -> Resolved:
    if isinstance(reference.value, Mapping):
        return _output_of(tx, reference, str(reference.value.get("from", "")))
    if is_id("job", reference.value):
        return _output_of(tx, reference, reference.value)
    if reference.what in ("dataset", "prompts"):
        return _file(tx, reference)
    return _model(tx, reference)


def _file(tx: Connection, reference: Reference) -> Resolved:
    name = str(reference.value)
    by = FileRow.id == parse_id("file", name) if is_id("file", name) else FileRow.name == name
    row = tx.execute(
        select(FileRow.id, FileRow.name, FileRow.state, FileRow.report)
        .where(by, FileRow.deleted_at.is_(None))
        .order_by(FileRow.id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no file {name[:80]!r}.",
            field=reference.field,
            hint="upload it first (`tuneyard files put FILE`) and name its id",
        )
    if row.state == "rejected":
        raise rejected_file(row, reference.field)
    waits_for = [] if row.state == "processed" else [row.id]
    return Resolved({reference.field: {"file": str(row.id)}}, files=waits_for)


def rejected_file(row: Row[Any], field: str) -> InputError:
    """The refusal of a file that its check rejected, with the check's first problem."""
    problem = (row.report or {}).get("problems", [{}])[0]
    return InputError(
        f"File {row.name!r} was rejected: {problem.get('message', 'its check failed')}",
        code="bad_data",
        field=field,
        line=problem.get("line"),
        hint=problem.get("hint"),
    )


def _model(tx: Connection, reference: Reference) -> Resolved:
    name = str(reference.value)
    if is_id("base_model", name):
        base_by = BaseModelRow.id == parse_id("base_model", name)
    else:
        base_by = BaseModelRow.name == name
    base = tx.execute(
        select(BaseModelRow.id).where(base_by).order_by(BaseModelRow.published_at.desc()).limit(1)
    ).scalar_one_or_none()
    if base is not None and reference.what == "model":
        return Resolved({reference.field: {"base_model": str(base)}})
    by = ModelRow.id == parse_id("model", name) if is_id("model", name) else ModelRow.name == name
    tuned = tx.execute(select(ModelRow.artifact_id, ModelRow.base_model_id).where(by)).one_or_none()
    if tuned is not None:
        return _tuned(reference, tuned.artifact_id, tuned.base_model_id)
    return _downloading(tx, reference, name)


def _tuned(reference: Reference, artifact_id: UUID, base_model_id: UUID) -> Resolved:
    adapter = {"adapter": {"artifact": str(artifact_id)}}
    if reference.what == "model":
        return Resolved({reference.field: {"base_model": str(base_model_id)}} | adapter)
    return Resolved(adapter)


def _downloading(tx: Connection, reference: Reference, name: str) -> Resolved:
    """A model of this name that is on its way, or a refusal that lists what there is."""
    job = tx.execute(
        select(JobRow.id)
        .where(JobRow.kind == "download", JobRow.spec["model_name"].astext == name)
        .where(JobRow.finished_at.is_(None))
        .order_by(JobRow.id.desc())
        .limit(1)
    ).scalar_one_or_none()
    if job is not None and reference.what == "model":
        return Resolved({}, parents=[(job, "base_model")])
    bases = tx.execute(select(BaseModelRow.name).distinct().limit(10)).scalars().all()
    tuned = tx.execute(select(ModelRow.name).order_by(ModelRow.id.desc()).limit(10)).scalars().all()
    known = ", ".join([*bases, *tuned] if reference.what == "model" else tuned) or "none yet"
    raise NotFound(
        f"There is no {reference.what} {name[:80]!r}.",
        code="model_not_found",
        field=reference.field,
        hint=f"known here: {known}; a download job brings a new one",
    )


def _output_of(tx: Connection, reference: Reference, name: str) -> Resolved:
    job_name, _, output = name.partition(".")
    job = tx.execute(
        select(JobRow.id, JobRow.kind, JobRow.state, JobRow.inputs).where(
            JobRow.id == parse_id("job", job_name)
        )
    ).one_or_none()
    if job is None:
        raise NotFound(f"There is no job {job_name[:60]}.", field=reference.field)
    if job.kind not in OUTPUTS:
        raise InputError(
            f"A {job.kind} job brings nothing forth.",
            code="wrong_output",
            field=reference.field,
            hint="name the model that it serves",
        )
    output = output or OUTPUTS[job.kind]
    _check_fits(reference, job.kind, output)
    if job.state == JobState.SUCCEEDED:
        return _published(tx, reference, job)
    if JobState(job.state) in TERMINAL:
        raise InputError(
            f"Job {job_name} {job.state}: it brings forth no {output}.",
            code="dependency_failed",
            field=reference.field,
            hint="name a job that succeeded or still runs",
        )
    return Resolved({}, parents=[(job.id, output)])


def _check_fits(reference: Reference, kind: str, output: str) -> None:
    fits = {"model": ("base_model", "adapter"), "adapter": ("adapter",), "dataset": ("dataset",)}
    if output != OUTPUTS[kind] or output not in fits.get(reference.what, ()):
        raise InputError(
            f"The {output} of a {kind} job cannot be a {reference.what}.",
            code="wrong_output",
            field=reference.field,
            hint=f"a {kind} job brings forth: {OUTPUTS[kind]}",
        )


def _published(tx: Connection, reference: Reference, job: Row[Any]) -> Resolved:
    if job.kind == "download":
        base = tx.execute(
            select(BaseModelRow.id)
            .join(JobRow, JobRow.spec["model_name"].astext == BaseModelRow.name)
            .where(JobRow.id == job.id)
            .order_by(BaseModelRow.published_at.desc())
            .limit(1)
        ).scalar_one()
        return Resolved({reference.field: {"base_model": str(base)}})
    artifact = tx.execute(
        select(ArtifactRow.id).where(
            ArtifactRow.job_id == job.id, ArtifactRow.kind == OUTPUTS[job.kind]
        )
    ).scalar_one()
    return _tuned(reference, artifact, UUID(job.inputs["model"]["base_model"]))


def show_input(value: Mapping[str, str]) -> str:
    """An input as its readers know it: ``file_…``, ``artifact_…`` or ``base_…``."""
    ((kind, uuid),) = value.items()
    return show_id(kind, UUID(uuid))
