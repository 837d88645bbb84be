"""From what a spec names (ids, names, other jobs) to the artifacts and files that a runner gets.

``jobs.inputs`` maps each field to what it became. It is written when the job is submitted, so that
nothing of the same name that comes later takes a thing's place; what another job has still to
bring forth stands there as that job, until it has:

    {"model": {"base_model": uuid}, "adapter": {"artifact": uuid}, "dataset": {"file": uuid}}
    {"model": {"job": uuid, "output": "base_model", "what": "base"}, "prompts": {"file": uuid}}

``what`` is that of specs.fields.Reference; of a data set with several files, ``data_file`` beside
the job says which one is meant. A model that
is not here yet but could be brought has ``source``, until a download job is made for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, select, text
from sqlalchemy.orm import aliased

from tuneyard.models.tables import ArtifactRow, BaseModelRow, FileRow, JobRow, ModelRow
from tuneyard.specs.download import implied_download
from tuneyard.specs.errors import InputError, NotFound
from tuneyard.specs.fields import DATA_FILES, model_name_of
from tuneyard.specs.ids import PREFIXES, is_id, parse_id, show_id
from tuneyard.specs.jobs import Reference
from tuneyard.specs.states import TERMINAL, JobState
from tuneyard.specs.tuning import WHOLE, use_refused

OUTPUTS = {
    "download": "base_model",
    "finetune": "adapter",
    "inference": "results",
    "evaluate": "results",
    "merge": "model",
    "prepare": "tokens",
}
"""Kind of job -> kind of what it brings forth; a download of a data set: see output_of."""

FITS = {
    "model": ("base_model", "model", "adapter"),
    "base": ("base_model", "model"),
    "base_of": ("adapter",),
    "adapter": ("adapter",),
    "reward_model": ("adapter", "model", "base_model"),
    "dataset": ("dataset",),
    "tokens": ("tokens",),
}
"""What a reference asks for -> the outputs that can be it."""

MERGE_FIRST = "merge it first (`tuneyard merge JOB`), or name the base that it was tuned over"
GO_ON = f"{MERGE_FIRST}; a fine-tune goes on from it by adapter: its name"

Input = Mapping[str, str]
Inputs = Mapping[str, Input]


def output_of(kind: str, document: Mapping[str, Any]) -> str:
    """What a job of this spec brings forth."""
    if kind == "download" and document.get("what") == "dataset":
        return "dataset"
    if kind == "finetune" and document.get("finetuning_type") in WHOLE:
        return "model"
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
        elif reference.field not in (kept or {}):
            message = "model is a tuned model, an adapter over its base, and this is another one."
            hint = "leave adapter out, or name the base as model"
            raise InputError(message, code="conflicting_fields", field=reference.field, hint=hint)
    resolved = complete(tx, team_id, inputs)
    check_bases(tx, team_id, references, resolved.inputs)
    check_uses(tx, team_id, references, resolved.inputs)
    return resolved


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
        hint="upload it first (`tuneyard files put FILE`) and name its id; names of"
        " dataset_info.json are not known here: name the file itself, such as data/identity.json",
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


def _whole_already(field: str, kind: str) -> InputError:
    """The refusal of a model that stands alone where an adapter is wanted."""
    made = "A fine-tune of whole weights leaves" if kind == "finetune" else "This is"
    hint = "ask it, or tune it on, as it is: model: its name"
    return InputError(
        f"{made} a whole model, no adapter.", code="not_an_adapter", field=field, hint=hint
    )


def _model(tx: Connection, team_id: UUID, reference: Reference) -> Inputs:
    name = str(reference.value)
    whole = ("model", "base", "reward_model")
    if reference.what in whole and (base := _base_named(tx, name)) is not None:
        return {reference.field: {"base_model": str(base)}}
    by = ModelRow.id == parse_id("model", name) if is_id("model", name) else ModelRow.name == name
    row = tx.execute(MODEL.where(by, ModelRow.team_id == team_id)).one_or_none()
    if row is None:
        return _on_its_way(tx, team_id, reference, name)
    return _tuned(reference.field, reference.what, row.kind, row.artifact_id, _over(row))


_PARENT = aliased(ModelRow)
MODEL = select(
    ModelRow.kind,
    ModelRow.artifact_id,
    ModelRow.base_model_id,
    _PARENT.artifact_id.label("parent_artifact_id"),
).outerjoin(_PARENT, _PARENT.id == ModelRow.parent_model_id)


def _over(row: Row[str, UUID, UUID | None, UUID]) -> Input:
    """What a row of MODEL was made of."""
    if row.base_model_id is not None:
        return {"base_model": str(row.base_model_id)}
    return {"artifact": str(row.parent_artifact_id)}


def _base_named(tx: Connection, name: str) -> UUID | None:
    """The newest base model of this name, or the one of this id."""
    if is_id("base_model", name):
        by = BaseModelRow.id == parse_id("base_model", name)
    else:
        by = BaseModelRow.name == name
    newest = select(BaseModelRow.id).where(by).order_by(BaseModelRow.published_at.desc()).limit(1)
    return tx.execute(newest).scalar_one_or_none()


def knows_model(tx: Connection, team_id: UUID, name: str) -> bool:
    """Whether a name or id is that of a model which is here or on its way."""
    reference = Reference(field="model", what="model", value=name)
    try:
        return "source" not in _resolve_one(tx, team_id, reference)["model"]
    except InputError:
        return False


def _tuned(field: str, what: str, kind: str, artifact_id: UUID, base: Input) -> Inputs:
    """What a tuned model is to a reference. kind: adapter, which needs its base, or model."""
    own = {"artifact": str(artifact_id)}
    if kind == "model":
        if what in ("model", "base", "reward_model"):
            return {field: own}
        raise _whole_already(field, "merge")
    if what == "base":
        message = "This is an adapter, which is no model by itself."
        raise InputError(message, code="not_a_whole_model", field=field, hint=GO_ON)
    if what == "model":
        return {field: base, "adapter": own}
    if what == "reward_model":
        return {field: own, "reward_base": base}
    return {field: base if what == "base_of" else own}


# A fine-tune is also known by the output_dir of its file, as LLaMA-Factory's users call it.
ON_ITS_WAY = text("""
    SELECT id FROM jobs
    WHERE team_id = :team AND kind = ANY (:kinds) AND state NOT IN ('failed', 'cancelled')
      AND (finished_at IS NULL OR kind = 'finetune')
      AND CASE kind
          WHEN 'finetune' THEN :name IN (name, rtrim(spec ->> 'output_dir', '/'))
          ELSE :name = coalesce(spec ->> 'model_name', name) END
    ORDER BY id DESC LIMIT 1
""")
MAKERS = {"base": ["download", "merge"], "model": ["download", "merge", "finetune"]}
MAKERS["reward_model"] = MAKERS["model"]
"""What a reference asks for -> kinds of job that may be making it just now."""


def _on_its_way(tx: Connection, team_id: UUID, reference: Reference, name: str) -> Inputs:
    """What a job of this name brings forth, or could, or a refusal that lists what there is."""
    kinds = MAKERS.get(reference.what, ["finetune"])
    values = {"kinds": kinds, "name": name.rstrip("/"), "team": team_id}
    job = tx.execute(ON_ITS_WAY, values).scalar_one_or_none()
    if job is None and "finetune" in kinds:
        job = _tuning(tx, team_id, name)
    if job is not None:
        return _output_of(tx, team_id, reference, show_id("job", job))
    if reference.what in MAKERS and implied_download(name) is not None:
        return {reference.field: {"source": name, "what": reference.what}}
    if reference.what not in MAKERS and _base_named(tx, name) is not None:
        message, hint = f"{name[:80]!r} is a base model, no adapter.", "name a tuned model"
        raise InputError(message, code="not_an_adapter", field=reference.field, hint=hint)
    raise _unknown(tx, team_id, reference, name)


def _tuning(tx: Connection, team_id: UUID, name: str) -> UUID | None:
    """The newest open fine-tune whose model will be called so."""
    rows = tx.execute(
        select(JobRow.id, JobRow.name)
        .where(JobRow.kind == "finetune", JobRow.team_id == team_id, JobRow.finished_at.is_(None))
        .order_by(JobRow.id.desc())
        .limit(200)
    )
    return next((row.id for row in rows if model_name_of(row.name) == name), None)


def _unknown(tx: Connection, team_id: UUID, reference: Reference, name: str) -> NotFound:
    fits = FITS[reference.what]
    newest = select(ModelRow.name).where(ModelRow.team_id == team_id, ModelRow.kind.in_(fits))
    known = tx.execute(newest.order_by(ModelRow.id.desc()).limit(10)).scalars().all()
    if "base_model" in fits:
        bases = tx.execute(select(BaseModelRow.name).distinct().limit(10)).scalars().all()
        known, what, maker = [*bases, *known], "model", "download"
    else:
        what, maker = "adapter", "finetune"
    return NotFound(
        f"There is no {what} {name[:80]!r}.",
        code="model_not_found",
        field=reference.field,
        hint=f"known here: {', '.join(known) or 'none yet'}; a {maker} job brings a new one",
    )


def _output_of(tx: Connection, team_id: UUID, reference: Reference, name: str) -> Inputs:
    job_name, _, output = name.partition(".")
    job_id = parse_id("job", job_name)
    job = tx.execute(
        select(JobRow.kind, JobRow.spec, JobRow.inputs).where(
            JobRow.id == job_id, JobRow.team_id == team_id
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
    brings = output_of(job.kind, job.spec)
    output = output or brings
    if reference.what in ("adapter", "base_of") and output == brings == "model":
        raise _whole_already(reference.field, job.kind)
    _check_fits(reference, job.kind, output, brings)
    if reference.what == "base_of":
        # What an adapter is being tuned over is known before it is there.
        return {reference.field: job.inputs["model"]}
    awaited = {"job": str(job_id), "output": output, "what": reference.what}
    if reference.data_file is not None:
        awaited["data_file"] = reference.data_file
    return {reference.field: awaited}


def _check_fits(reference: Reference, kind: str, output: str, brings: str) -> None:
    if output == brings and output in FITS.get(reference.what, ()):
        return
    job = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} job"
    forth = f"{job} brings forth: {brings}"
    raise InputError(
        f"The {output} of {job} cannot be {_shown_what(reference)}.",
        code="wrong_output",
        field=reference.field,
        hint=GO_ON if (reference.what, output) == ("base", "adapter") else forth,
    )


def _shown_what(reference: Reference) -> str:
    names = {"base": "a model to work on", "adapter": "an adapter", "base_of": "an adapter"}
    return names.get(reference.what, f"a {reference.what}")


def _published(tx: Connection, team_id: UUID, field: str, value: Mapping[str, str]) -> Inputs:
    """What a job brought forth, or the job itself while it may still do so."""
    job = tx.execute(
        select(JobRow.id, JobRow.kind, JobRow.state, JobRow.spec, JobRow.inputs).where(
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
    brought = output_of(job.kind, job.spec)
    artifact = tx.execute(
        select(ArtifactRow.id).where(ArtifactRow.job_id == job.id, ArtifactRow.kind == brought)
    ).scalar_one()
    if job.kind == "prepare":
        return {field: {"artifact": str(artifact)}}
    return _tuned(field, value["what"], brought, artifact, job.inputs["model"])


def _downloaded(tx: Connection, job_id: UUID) -> UUID:
    found: UUID = tx.execute(
        select(BaseModelRow.id)
        .join(JobRow, JobRow.spec["model_name"].astext == BaseModelRow.name)
        .where(JobRow.id == job_id)
        .order_by(BaseModelRow.published_at.desc())
        .limit(1)
    ).scalar_one()
    return found


def check_bases(
    tx: Connection, team_id: UUID, references: Sequence[Reference], inputs: Inputs
) -> None:
    """Refuse a base that is not the very one of the adapter; what is not known yet is not judged.

    Raises: InputError base_mismatch.
    """
    for reference in references:
        for field in reference.fits:
            own, asked = _base_of(tx, team_id, inputs[field]), inputs[reference.field]
            unknown = _digest(tx, own) is None or _digest(tx, asked) is None
            if unknown or _digest(tx, own) == _digest(tx, asked):
                continue
            merges = next(r.use == "merge" for r in references if r.field == field)
            raise InputError(
                f"The {field} was tuned over {_named(tx, own)}; this is {_named(tx, asked)}.",
                code="base_mismatch",
                field=reference.field,
                hint=_OTHER_BASE if merges else f"model: {_name_of(tx, own)}",
            )


_OTHER_BASE = "leave model out to merge onto its own base; force: true merges anyway"


def check_uses(
    tx: Connection, team_id: UUID, references: Sequence[Reference], inputs: Inputs
) -> None:
    """Refuse what was tuned and cannot be used so, by the spec that made or makes it.

    Raises: InputError unfit_adapter.
    """
    for reference in references:
        own = "adapter" if (reference.use, reference.field) == ("speak", "model") else None
        named = inputs.get(own or reference.field, {})
        if reference.use is None or not named.keys() & {"artifact", "job"}:
            continue
        document = _made_by(tx, team_id, named)
        refused = use_refused(reference.use, document)  # type: ignore[arg-type]  # one of Use
        if refused is not None:
            message, hint = refused
            raise InputError(message, code="unfit_adapter", field=reference.field, hint=hint)


def _made_by(tx: Connection, team_id: UUID, adapter: Input) -> Mapping[str, Any]:
    """The spec of the job that an adapter or a model comes of, or is to come of."""
    spec = select(JobRow.spec).where(JobRow.team_id == team_id)
    if "job" in adapter:
        return dict(tx.execute(spec.where(JobRow.id == UUID(adapter["job"]))).scalar_one())
    maker = select(ArtifactRow.job_id).where(ArtifactRow.id == UUID(adapter["artifact"]))
    return dict(tx.execute(spec.where(JobRow.id == maker.scalar_subquery())).scalar_one())


def _base_of(tx: Connection, team_id: UUID, adapter: Input) -> Input:
    """What an adapter is tuned over: one that is there, or that a job is to bring forth."""
    if "job" in adapter:
        tuning = select(JobRow.inputs).where(JobRow.id == UUID(adapter["job"]))
        own: Input = tx.execute(tuning).scalar_one()["model"]
        return own
    by = ModelRow.artifact_id == UUID(adapter["artifact"])
    return _over(tx.execute(MODEL.where(by, ModelRow.team_id == team_id)).one())


def _digest(tx: Connection, value: Input) -> str | None:
    """What tells a model's bytes apart; None while they are not there."""
    if "base_model" in value:
        one = select(BaseModelRow.digest).where(BaseModelRow.id == UUID(value["base_model"]))
    elif "artifact" in value:
        one = select(ArtifactRow.digest).where(ArtifactRow.id == UUID(value["artifact"]))
    else:
        return None
    return tx.execute(one).scalar_one_or_none()


def _named(tx: Connection, value: Input) -> str:
    """A model by name, revision and digest, so that two of one name are told apart."""
    if "base_model" not in value:
        return f"{show_input(value)} ({(_digest(tx, value) or '')[:12]})"
    row = tx.execute(
        select(BaseModelRow.name, BaseModelRow.revision, BaseModelRow.digest).where(
            BaseModelRow.id == UUID(value["base_model"])
        )
    ).one()
    return f"{row.name} {row.revision} ({row.digest[:12]})"


def _name_of(tx: Connection, model: Input) -> str:
    """What a spec may call a model that is there."""
    if "base_model" in model:
        by = select(BaseModelRow.name).where(BaseModelRow.id == UUID(model["base_model"]))
    else:
        by = select(ModelRow.name).where(ModelRow.artifact_id == UUID(model["artifact"]))
    return str(tx.execute(by).scalar_one())


def show_input(value: Mapping[str, str]) -> str:
    """An input as its readers know it: ``file_…``, ``artifact_…``, ``base_…``, or ``job_…``."""
    kind = next(name for name in value if name in PREFIXES)
    return show_id(kind, UUID(value[kind]))
