"""From a document as people write it to a checked job spec, with every problem named at once."""

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from tuneyard.specs.base_models import RemoteCode
from tuneyard.specs.clashes import clashes_of
from tuneyard.specs.conversations import UNSTORABLE, all_within
from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import Forbidden, InputError, SpecRejected
from tuneyard.specs.evaluate import EvaluateSpec
from tuneyard.specs.fields import WHAT, Reference, Spec
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.llamafactory import (
    ALSO_DEFAULT,
    GENERATING,
    INSTEAD,
    LATER,
    MEANT,
    NOT_YET,
    ON_CPU,
    PATHS,
    SAME_AS,
    SECRETS,
    TUNING,
    WITHOUT_EFFECT,
)
from tuneyard.specs.merge import MergeSpec
from tuneyard.specs.notes import Note, notes_on
from tuneyard.specs.prepare import PrepareSpec
from tuneyard.specs.problems import HINTED, nearest, problem, problems_of, shown
from tuneyard.specs.serve import ServeSpec
from tuneyard.specs.sources import read_source
from tuneyard.specs.wording import FieldRow, field_rows, leaves

__all__ = ["TEXT_FIELDS", "JobSpec", "Note", "Reference", "describe_fields", "read_spec"]

JobSpec = (
    FinetuneSpec | MergeSpec | InferenceSpec | EvaluateSpec | DownloadSpec | PrepareSpec | ServeSpec
)

KINDS: dict[str, type[Spec]] = {
    "finetune": FinetuneSpec,
    "merge": MergeSpec,
    "inference": InferenceSpec,
    "evaluate": EvaluateSpec,
    "download": DownloadSpec,
    "prepare": PrepareSpec,
    "serve": ServeSpec,
}

TRAINS_NOTHING = {
    InferenceSpec: "an inference",
    MergeSpec: "a merge",
    ServeSpec: "a serve",
    EvaluateSpec: "an evaluate",
}

READ_ONLY = frozenset(
    """
    id state team team_id token node created_at finished_at attempts progress wait_reason system
    retry_of pipeline_id inputs error notes demand allowed_actions
    """.split()  # noqa: SIM905 - reads best as text
)
"""What an answer shows and a submission may not say."""

MAX_PROBLEMS = 100

_FLAGS = {
    "yes": True, "on": True, "true": True, "y": True,
    "no": False, "off": False, "false": False, "n": False,
}  # fmt: skip


def read_spec(
    document: Mapping[str, Any], *, remote_code: RemoteCode = "refused"
) -> tuple[JobSpec, list[Note]]:
    """Check a document. Raises: SpecRejected with all problems, each with its field and mend."""
    try:
        return _read_spec(document, remote_code)
    except SpecRejected as error:
        raise as_written(document, error) from None


def _read_spec(document: Mapping[str, Any], remote_code: RemoteCode) -> tuple[JobSpec, list[Note]]:
    kind = _kind(document)
    reading = _Reading(KINDS[kind], remote_code)
    for written, value in document.items():
        if written != "kind":
            reading.take(str(written), value)
    reading.settle()
    try:
        spec = reading.model.model_validate({**reading.values, "kind": kind})
    except ValidationError as error:
        refused = {each.field for each in reading.problems}
        more = [each for each in problems_of(error, reading.model) if each.field not in refused]
        raise rejected(reading.problems + more) from None
    problems = reading.problems
    if not {each.field for each in problems} & {"stage", "finetuning_type"}:
        problems = problems + clashes_of(spec)  # not with a default that nobody asked for
    if problems:
        raise rejected(problems)
    return spec, reading.notes + notes_on(spec)  # type: ignore[return-value]  # one of KINDS


def as_written(document: Mapping[str, Any], error: InputError) -> InputError:
    """The same error, with fields as the document calls them: LLaMA-Factory's names for ours."""
    names = {SAME_AS[name]: name for name in document if name in SAME_AS}
    for each in [error, *(error.problems if isinstance(error, SpecRejected) else [])]:
        field = each.field or ""
        ours = re.split(r"\W", field, maxsplit=1)[0]
        if ours in names and ours not in document:
            rename = re.compile(rf"^{ours}\b")
            each.field = rename.sub(names[ours], field)
            each.message = rename.sub(names[ours], each.message)
    return error


def rejected(problems: list[InputError]) -> SpecRejected:
    """All problems as one error: 403 where each of them is, for example."""
    error = SpecRejected(problems[:MAX_PROBLEMS])
    error.http_status = min(each.http_status for each in problems)
    if any(each.http_status != error.http_status for each in problems):
        error.http_status = SpecRejected.http_status
    return error


def _kind(document: Mapping[str, Any]) -> str:
    if not isinstance(document, Mapping):
        raise InputError("A job is an object of names and values.", code="not_an_object")
    kind = document.get("kind")
    if kind is None and _exports(document):
        return "merge"
    if kind in (None, "finetune") and _only_measures(document):
        return "evaluate"
    if kind is None and _trains(document):
        return "finetune"
    choices = f"one of {', '.join(KINDS)}"
    if kind is None and "infer_backend" in document:
        choices += "; this is what `llamafactory-cli chat` reads: `tuneyard chat MODEL` asks"
    if kind is None:
        raise SpecRejected([problem("missing_field", "kind is missing.", "kind", choices)])
    if not isinstance(kind, str):
        raise SpecRejected([problem("wrong_type", "kind must be a text.", "kind", choices)])
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        hint = f"did you mean {near}?" if near else choices
        message = f"There is no kind {shown(kind)}."
        raise SpecRejected([problem("bad_choice", message, "kind", hint)])
    return kind


def _trains(document: Mapping[str, Any]) -> bool:
    """Whether this is what `llamafactory-cli train` reads; `chat` names a backend, and no stage."""
    if {"stage", "do_train", "dataset"} & set(document):
        return True
    return "model_name_or_path" in document and "infer_backend" not in document


def _exports(document: Mapping[str, Any]) -> bool:
    """Whether this is what `llamafactory-cli export` reads."""
    told = {name for name, value in document.items() if value is not None}
    adapter = {"adapter", "adapter_name_or_path"} & told
    return "export_dir" in told and (bool(adapter) or not {"dataset", "training_file"} & told)


def _only_measures(document: Mapping[str, Any]) -> bool:
    """do_eval or do_predict, and no training: said, or by a file that names nothing to learn."""
    asks = any(_flag(document.get(name)) is True for name in ("do_eval", "do_predict"))
    trains = _flag(document.get("do_train"))
    if trains is None and document.get("kind") is None:
        trains = any(document.get(name) is not None for name in ("dataset", "training_file"))
    return asks and trains is False


class _Reading:
    """A document on its way to a spec: our names for other names, unset for null, and the rest."""

    def __init__(self, model: type[Spec], remote_code: RemoteCode) -> None:
        self.model = model
        self.remote_code = remote_code
        self.values: dict[str, Any] = {}
        self.notes: list[Note] = []
        self.problems: list[InputError] = []
        self._written: dict[str, str] = {}
        self._unknown = 0

    def take(self, written: str, value: Any) -> None:
        """Put one name of the document where it belongs."""
        name = SAME_AS.get(written, written)
        if name in READ_ONLY:
            hint = "leave it out: the server sets it"
            self._refuse("read_only_field", f"{written} cannot be set.", written, hint)
        elif name in self.model.model_fields:
            self._set(name, written, value)
        elif written in ON_CPU:
            self._on_cpu(written, value)
        elif written in WITHOUT_EFFECT:
            self._note(written, f"{written} has no effect: {WITHOUT_EFFECT[written]}")
        elif written in NOT_YET:
            self._take_later(written, value)
        else:
            self._take_other(name, written, value)

    def settle(self) -> None:
        """What only the whole document tells."""
        if self.model is MergeSpec and "adapter" not in self._written:
            hint = "an id, a name, or {from: a job}; a model that was tuned whole needs no merge: "
            hint += "`tuneyard fetch JOB --out DIR` brings it"
            self._refuse("missing_field", "adapter is missing.", "adapter", hint)
        if self.model is DownloadSpec and "model_name" not in self.values:
            self._name_download()
        ratio, steps = self.values.get("warmup_ratio"), self.values.get("warmup_steps")
        if ratio and steps and not isinstance(ratio, str):
            del self.values["warmup_ratio"]
            self._note("warmup_ratio", "warmup_ratio has no effect beside warmup_steps")

    def _name_download(self) -> None:
        """What a download is called: as its job, else as its source."""
        if "name" in self.values:
            self.values["model_name"] = self.values["name"]
            return
        try:
            self.values["model_name"] = read_source(str(self.values.get("source"))).likely_name
        except InputError:
            self.values["model_name"] = "model"  # the source itself is what will be complained of

    def _set(self, name: str, written: str, value: Any) -> None:
        if name in self._written:
            message = f"{self._written[name]} and {written} mean the same."
            self._refuse("conflicting_fields", message, written, "give one of them")
            return
        self._written[name] = written
        if written == "adapter_name_or_path" and self.model is FinetuneSpec:
            self.values.setdefault("reference", "base")
        if written == "evaluation_strategy":
            self._note(written, "evaluation_strategy is called eval_strategy now")
        if isinstance(value, str) and value in LATER.get(name, ()):
            self._not_yet(name, written, value)
            return
        if value is not None and not self._odd(name, value):
            self.values[name] = _understood(value, self.model, name)

    def _on_cpu(self, written: str, value: Any) -> None:
        if _flag(value) is True:
            self.values.setdefault("device", "cpu")
            self._note(written, f"{written} is understood as device: cpu")

    def _take_later(self, written: str, value: Any) -> None:
        if is_default(written, value):
            return
        if written == "trust_remote_code" and self.remote_code == "ignored":
            self._note(written, f"{written} has no effect: code of a model's own is never run")
        elif written == "trust_remote_code":
            message = "Code of a model's own is not run here."
            hint = "leave it out, or say false: families that transformers has itself need none"
            refused = Forbidden(message, code="remote_code_forbidden", field=written, hint=hint)
            self.problems.append(refused)
        elif written in PATHS and isinstance(value, str) and re.search(r"[/\\~]", value):
            message = f"{written} names a path, which is the server's disk over HTTP."
            self._refuse("path_not_allowed", message, written, INSTEAD.get(written))
        else:
            self._not_yet(written, written, value)

    def _take_other(self, name: str, written: str, value: Any) -> None:
        if name == "quantization_bit":
            if value is not None:
                self._not_yet(name, written, value)
        elif name in GENERATING and self.model is MergeSpec:
            self._note(written, f"{written} has no effect: only an inference job generates")
        elif name in _taught(self.model):
            kind = TRAINS_NOTHING[self.model]
            self._note(written, f"{written} has no effect: {kind} job trains nothing")
        else:
            self._refuse_unknown(name, written)

    def _refuse_unknown(self, name: str, written: str) -> None:
        self._unknown += 1
        field = written[:80].encode("utf-8", "replace").decode()
        elsewhere = [kind for kind, model in KINDS.items() if name in model.model_fields]
        meant = MEANT.get(written.lower())
        if meant in self.model.model_fields:
            hint = f"did you mean {meant}?"
        elif elsewhere:
            hint = f"kind {' and '.join(elsewhere)} has it: remove it, or is kind wrong?"
        else:
            hint = self._nearest(written)
        self._refuse("unknown_field", f"There is no field {field!r} here.", field, hint)

    def _nearest(self, written: str) -> str:
        ours, others = [*self.model.model_fields, *SAME_AS], [*NOT_YET, *WITHOUT_EFFECT]
        near = None
        if self._unknown <= HINTED:
            near = nearest(written, ours) or nearest(written, others)
        return f"did you mean {near}?" if near else "docs/reference lists the fields of each kind"

    def _odd(self, name: str, value: Any) -> bool:
        """NUL and lone surrogates, which the database cannot hold, and numbers that are none."""
        for leaf in all_within(value):
            if isinstance(leaf, str) and UNSTORABLE.search(leaf):
                message = f"{name} holds a character that cannot be stored."
                self._refuse("bad_character", message, name, "remove NUL and surrogates")
                return True
            if isinstance(leaf, float) and not math.isfinite(leaf):
                self._refuse("not_finite", f"{name} is not a finite number.", name, None)
                return True
        return False

    def _not_yet(self, name: str, written: str, value: Any) -> None:
        said = written if written in SECRETS else f"{written} = {shown(value)}"
        hint = INSTEAD.get(name, "leave it out")
        hint = f"use {hint}" if name in LATER else hint
        self._refuse("not_supported_yet", f"{said} is not supported yet.", written, hint)

    def _refuse(self, code: str, message: str, field: str, hint: str | None) -> None:
        self.problems.append(problem(code, message, field, hint))

    def _note(self, field: str, message: str) -> None:
        self.notes.append(Note(field=field, message=message))


def is_default(name: str, value: Any) -> bool:
    """Whether a value of NOT_YET asks for nothing that is not done anyway."""
    default = NOT_YET[name]
    if value is None:
        return True
    if isinstance(default, bool):
        return _flag(value) is default
    if default is None or default == "":
        text = value.strip().lower() if isinstance(value, str) else value
        return text in (False, 0, "", "none", "null", "no", "off", "false") or text in ([], {})
    if isinstance(default, str):
        return value in (default, *ALSO_DEFAULT.get(name, ()))
    return isinstance(value, int | float) and not isinstance(value, bool) and value == default


def _flag(value: Any) -> Any:
    """YAML's words for true and false; anything else as it is."""
    return _FLAGS.get(value.lower(), value) if isinstance(value, str) else value


def _understood(value: Any, model: type[Spec], name: str) -> Any:
    """YAML's habits: yes and no where a flag is wanted."""
    wanted = list(leaves(model.model_fields[name].annotation))
    return _flag(value) if wanted == [bool] else value


def _taught(model: type[Spec]) -> frozenset[str]:
    """Fields of a training that a file for another job may carry without effect."""
    if model is EvaluateSpec:
        return LEARNING
    return TUNING if model in TRAINS_NOTHING else frozenset()


LEARNING = frozenset(FinetuneSpec.model_fields.keys() - EvaluateSpec.model_fields.keys())
"""Fields of a fine-tune that change nothing once it is over."""


def _takes_text(model: type[Spec], name: str) -> bool:
    found = list(leaves(model.model_fields[name].annotation))
    choices = {type(each) for leaf in found for each in get_args(leaf)}
    return not {int, float, bool} & ({*found} | choices)


_OF_NUMBERS = frozenset(
    {"layers_to_transform", "lr_scheduler_kwargs", "reward_funcs", "reward_weights"}
)
"""Lists and objects in which numbers stand."""

TEXT_FIELDS = frozenset(
    name
    for model in KINDS.values()
    for name in model.model_fields
    if _takes_text(model, name) and name not in _OF_NUMBERS
) | {other for other, ours in SAME_AS.items() if ours in WHAT}
"""Fields whose plain YAML scalars are texts, whatever they look like."""


def describe_fields() -> list[FieldRow]:
    """Every field of every kind, for the reference page."""
    return [row for kind, model in KINDS.items() for row in field_rows(kind, model)]
