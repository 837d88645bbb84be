"""From what a spec names (ids, names, other jobs) to the artifacts and files that a runner gets.

``jobs.inputs`` maps each field to what it became. It is written when the job is submitted, so that
nothing of the same name that comes later takes a thing's place; what another job has still to
bring forth stands there as that job, until it has:

    {"model": {"base_model": uuid}, "adapter": {"artifact": uuid}, "dataset": {"file": uuid}}
    {"model": {"job": uuid, "output": "base_model"}, "prompts": {"file": uuid}}

Of a data set with several files, ``data_file`` beside the job says which one is meant. A model that
is not here yet but could be brought is {"source": name}, until a download job is made for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, select

from tuneyard.models.tables import ArtifactRow, BaseModelRow, FileRow, JobRow, ModelRow
from tuneyard.specs.download import implied_download
from tuneyard.specs.errors import InputError, NotFound
from tuneyard.specs.fields import DATA_FILES, WHAT, model_name_of
from tuneyard.specs.ids import PREFIXES, is_id, parse_id, show_id
from tuneyard.specs.jobs import Reference
from tuneyard.specs.states import TERMINAL, JobState

OUTPUTS = {
    "download": "base_model",
    "finetune": "adapter",
    "inference": "results",
    "prepare": "tokens",
}
"""Kind of job -> kind of what it brings forth; a download of a data set: see output_of."""

Inputs = Mapping[str, Mapping[str, str]]


def output_of(kind: str, document: Mapping[str, Any]) -> str:
    """What a job of this spec brings forth."""
    if kind == "download" and document.get("what") == "dataset":
        return "dataset"
    return OUTPUTS[kind]


@dataclass(frozen=True)
class Resolved:
    """What references came to, and what of it is waited for: other jobs and files' checks."""

    inputs: Inputs
    unchecked: Sequence[UUID] = ()

    @property
    def parents(self) -> list[tuple[UUID, str]]:
        """The jobs that have still to bring an input forth, and what."""
        awaited = [value for value in self.inputs.values() if "job" in value]
        return list(dict.fromkeys((UUID(each["job"]), each["output"]) for each in awaited))

    @property
    def ready(self) -> bool:
        """Whether nothing is waited for."""
        return not self.parents and not self.unchecked

    @property
    def wait_reason(self) -> str | None:
        """What is waited for, in a sentence for the job's owner; None when all is there."""
        awaited = [f"{show_id('job', job)} ({output})" for job, output in self.parents]
        awaited += [f"the check of {show_id('file', file)}" for file in self.unchecked]
        return f"waits for {', '.join(awaited)}" if awaited else None


def resolve(
    tx: Connection, team_id: UUID, references: Sequence[Reference], *, kept: Inputs | None = None
) -> Resolved:
    """Look up all references of a team's spec, but for fields that are ``kept`` as they were.

    Raises: InputError that names the field and the mend.
    """
    inputs: dict[str, Mapping[str, str]] = dict(kept or {})
    for reference in references:
        if reference.field not in inputs:
            inputs |= _resolve_one(tx, team_id, reference)
    return complete(tx, team_id, inputs)


def complete(tx: Connection, team_id: UUID, inputs: Inputs) -> Resolved:
    """Put what jobs have brought forth by now in their place, and look at the files' checks.

    Raises: InputError where an input can never be had.
    """
    found: dict[str, Mapping[str, str]] = {}
    for field, value in inputs.items():
        found |= _published(tx, team_id, field, value) if "job" in value else {field: value}
    files = {field: UUID(value["file"]) for field, value in found.items() if "file" in value}
    unchecked = [file for field, file in files.items() if not _is_checked(tx, team_id, field, file)]
    return Resolved(found, tuple(dict.fromkeys(unchecked)))


def _is_checked(tx: Connection, team_id: UUID, field: str, file: UUID) -> bool:
    """Raises: InputError for a file that its check rejected, or that is gone."""
    row = tx.execute(
        select(FileRow.name, FileRow.state, FileRow.report).where(
            FileRow.id == file, FileRow.team_id == team_id, FileRow.deleted_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        raise _no_file(field, show_id("file", file))
    if row.state == "rejected":
        raise rejected_file(row, field)
    return bool(row.state == "processed")


def _resolve_one(tx: Connection, team_id: UUID, reference: Reference) -> Inputs:
    if isinstance(reference.value, Mapping):
        return _output_of(tx, team_id, reference, str(reference.value.get("from", "")))
    if is_id("job", reference.value):
        return _output_of(tx, team_id, reference, reference.value)
    if reference.what == "dataset" and is_id("artifact", reference.value):
        by = ArtifactRow.id == parse_id("artifact", reference.value)
        return _dataset(tx, team_id, reference.field, by, reference.data_file)
    if reference.what in ("dataset", "prompts"):
        return _file(tx, team_id, reference)
    return _model(tx, team_id, reference)


def _file(tx: Connection, team_id: UUID, reference: Reference) -> Inputs:
    """An upload by id or name; its row is held so that nobody deletes it meanwhile."""
    name = str(reference.value)
    by = FileRow.id == parse_id("file", name) if is_id("file", name) else FileRow.name == name
    file = tx.execute(
        select(FileRow.id)
        .where(by, FileRow.team_id == team_id, FileRow.deleted_at.is_(None))
        .order_by(FileRow.id.desc())
        .limit(1)
        .with_for_update(read=True)
    ).scalar_one_or_none()
    if file is None:
        raise _no_file(reference.field, name)
    return {reference.field: {"file": str(file)}}


def _dataset(
    tx: Connection, team_id: UUID, field: str, by: ColumnElement[bool], picked: str | None
) -> Inputs:
    """A downloaded data set, once it is sure which of its files is meant, and that it is fit."""
    row = tx.execute(
        select(ArtifactRow.id, ArtifactRow.manifest).where(
            by, ArtifactRow.team_id == team_id, ArtifactRow.kind == "dataset"
        )
    ).one_or_none()
    if row is None:
        hint = "`tuneyard artifacts JOB` lists what a job brought"
        raise NotFound("There is no such data set here.", field=field, hint=hint)
    _check_data_file(row.manifest.get("data_files") or [], field, picked)
    return {field: {"artifact": str(row.id)}}


def _check_data_file(files: Sequence[Mapping[str, Any]], field: str, picked: str | None) -> None:
    picks = DATA_FILES[field]
    names = [str(each["path"]) for each in files]
    found = [each for each in files if picked is None or each["path"] == picked]
    if len(found) != 1:
        what = "has several files" if picked is None else f"has no file {picked[:80]!r}"
        hint = f"set {picks} to one of: {', '.join(names[:10])}"
        message = f"The data set {what}."
        raise InputError(message, code="data_file_unclear", field=picks, hint=hint)
    problem = found[0].get("problem")
    if problem:
        raise InputError(
            f"{found[0]['path']} cannot be trained on: {problem.get('message')}",
            code="bad_data",
            field=field,
            line=problem.get("line"),
            hint=problem.get("hint"),
        )


def _no_file(field: str, name: str) -> NotFound:
    return NotFound(
        f"There is no file {name[:80]!r}.",
        field=field,
        hint="upload it first (`tuneyard files put FILE`) and name its id",
    )


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


def _model(tx: Connection, team_id: UUID, reference: Reference) -> Inputs:
    name = str(reference.value)
    if is_id("base_model", name):
        base_by = BaseModelRow.id == parse_id("base_model", name)
    else:
        base_by = BaseModelRow.name == name
    base = tx.execute(
        select(BaseModelRow.id).where(base_by).order_by(BaseModelRow.published_at.desc()).limit(1)
    ).scalar_one_or_none()
    if base is not None and reference.what == "model":
        return {reference.field: {"base_model": str(base)}}
    by = ModelRow.id == parse_id("model", name) if is_id("model", name) else ModelRow.name == name
    tuned = tx.execute(
        select(ModelRow.artifact_id, ModelRow.base_model_id).where(by, ModelRow.team_id == team_id)
    ).one_or_none()
    if tuned is not None:
        return _tuned(reference.field, tuned.artifact_id, tuned.base_model_id)
    return _downloading(tx, team_id, reference, name)


def knows_model(tx: Connection, team_id: UUID, name: str) -> bool:
    """Whether a name or id is that of a model which is here or on its way."""
    reference = Reference(field="model", what="model", value=name)
    try:
        return "source" not in _resolve_one(tx, team_id, reference)["model"]
    except InputError:
        return False


def _tuned(field: str, artifact_id: UUID, base_model_id: UUID) -> Inputs:
    adapter = {"adapter": {"artifact": str(artifact_id)}}
    if WHAT[field] == "model":
        return {field: {"base_model": str(base_model_id)}} | adapter
    return adapter


def _downloading(tx: Connection, team_id: UUID, reference: Reference, name: str) -> Inputs:
    """A model of this name that is on its way or can be, or a refusal that lists what there is."""
    job = tx.execute(
        select(JobRow.id)
        .where(JobRow.kind == "download", JobRow.spec["model_name"].astext == name)
        .where(JobRow.team_id == team_id, JobRow.finished_at.is_(None))
        .order_by(JobRow.id.desc())
        .limit(1)
    ).scalar_one_or_none()
    if reference.what == "model":
        if job is not None:
            return {reference.field: {"job": str(job), "output": "base_model"}}
        if implied_download(name) is not None:
            return {reference.field: {"source": name}}
    bases = tx.execute(select(BaseModelRow.name).distinct().limit(10)).scalars().all()
    newest = select(ModelRow.name).where(ModelRow.team_id == team_id)
    tuned = tx.execute(newest.order_by(ModelRow.id.desc()).limit(10)).scalars().all()
    known = ", ".join([*bases, *tuned] if reference.what == "model" else tuned) or "none yet"
    hint = f"known here: {known}; a download job brings a new one"
    if (tuning := _tuning(tx, team_id, name)) is not None:
        hint = f"{show_id('job', tuning)} is to bring it: name that job, and this one waits for it"
    raise NotFound(
        f"There is no {reference.what} {name[:80]!r}.",
        code="model_not_found",
        field=reference.field,
        hint=hint,
    )


def _tuning(tx: Connection, team_id: UUID, name: str) -> UUID | None:
    """The newest open fine-tune whose model will be called so."""
    rows = tx.execute(
        select(JobRow.id, JobRow.name)
        .where(JobRow.kind == "finetune", JobRow.team_id == team_id, JobRow.finished_at.is_(None))
        .order_by(JobRow.id.desc())
        .limit(200)
    )
    return next((row.id for row in rows if model_name_of(row.name) == name), None)


def _output_of(tx: Connection, team_id: UUID, reference: Reference, name: str) -> Inputs:
    job_name, _, output = name.partition(".")
    job_id = parse_id("job", job_name)
    job = tx.execute(
        select(JobRow.kind, JobRow.spec).where(JobRow.id == job_id, JobRow.team_id == team_id)
    ).one_or_none()
    if job is None:
        raise NotFound(f"There is no job {job_name[:60]}.", field=reference.field)
    brings = output_of(job.kind, job.spec)
    output = output or brings
    _check_fits(reference, job.kind, output, brings)
    awaited = {"job": str(job_id), "output": output}
    if reference.data_file is not None:
        awaited["data_file"] = reference.data_file
    return {reference.field: awaited}


def _check_fits(reference: Reference, kind: str, output: str, brings: str) -> None:
    fits = {"model": ("base_model", "adapter"), "adapter": ("adapter",), "dataset": ("dataset",)}
    if output != brings or output not in fits.get(reference.what, ()):
        raise InputError(
            f"The {output} of a {kind} job cannot be a {reference.what}.",
            code="wrong_output",
            field=reference.field,
            hint=f"a {kind} job brings forth: {brings}",
        )


def _published(tx: Connection, team_id: UUID, field: str, value: Mapping[str, str]) -> Inputs:
    """What a job brought forth, or the job itself while it may still do so."""
    job = tx.execute(
        select(JobRow.id, JobRow.kind, JobRow.state, JobRow.inputs).where(
            JobRow.id == UUID(value["job"]), JobRow.team_id == team_id
        )
    ).one()
    if JobState(job.state) not in TERMINAL:
        return {field: value}
    if job.state != JobState.SUCCEEDED:
        raise InputError(
            f"Job {show_id('job', job.id)} {job.state}: it brings forth no {value['output']}.",
            code="dependency_failed",
            field=field,
            hint="name a job that succeeded or still runs",
        )
    if value["output"] == "dataset":
        return _dataset(tx, team_id, field, ArtifactRow.job_id == job.id, value.get("data_file"))
    if job.kind == "download":
        return {field: {"base_model": str(_downloaded(tx, job.id))}}
    artifact = tx.execute(
        select(ArtifactRow.id).where(
            ArtifactRow.job_id == job.id, ArtifactRow.kind == OUTPUTS[job.kind]
        )
    ).scalar_one()
    if job.kind == "prepare":
        return {field: {"artifact": str(artifact)}}
    return _tuned(field, artifact, UUID(job.inputs["model"]["base_model"]))


def _downloaded(tx: Connection, job_id: UUID) -> UUID:
    found: UUID = tx.execute(
        select(BaseModelRow.id)
        .join(JobRow, JobRow.spec["model_name"].astext == BaseModelRow.name)
        .where(JobRow.id == job_id)
        .order_by(BaseModelRow.published_at.desc())
        .limit(1)
    ).scalar_one()
    return found


def show_input(value: Mapping[str, str]) -> str:
    """An input as its readers know it: ``file_…``, ``artifact_…``, ``base_…``, or ``job_…``."""
    kind = next(name for name in value if name in PREFIXES)
    return show_id(kind, UUID(value[kind]))
