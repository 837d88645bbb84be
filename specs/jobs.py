"""From a document as people write it to a checked job spec, with every problem named at once."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.fields import Reference, Spec
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.llamafactory import NOT_YET, SAME_AS, WITHOUT_EFFECT

__all__ = ["JobSpec", "Note", "Reference", "describe_fields", "read_spec"]

JobSpec = FinetuneSpec | InferenceSpec | DownloadSpec

KINDS: dict[str, type[Spec]] = {
    "finetune": FinetuneSpec,
    "inference": InferenceSpec,
    "download": DownloadSpec,
}

READ_ONLY = frozenset(
    """
    id state team team_id token node created_at finished_at attempts progress wait_reason system
    retry_of pipeline_id inputs error
    """.split()  # noqa: SIM905 - reads best as text
)
"""What an answer shows and a submission may not say."""

YES, NO = ("yes", "on", "true", "y"), ("no", "off", "false", "n")


class Note(BaseModel):
    """Something in a document that was understood otherwise than it was written."""

    model_config = ConfigDict(frozen=True)
    field: str
    message: str


def read_spec(document: Mapping[str, Any]) -> tuple[JobSpec, list[Note]]:
    """Check a document. Raises: SpecRejected with all problems, each with its field and mend."""
    kind = _kind(document)
    model = KINDS[kind]
    values, notes, problems = _normalise(document, model)
    try:
        spec = model.model_validate({**values, "kind": kind})
    except ValidationError as error:
        problems += list(_problems(error, model))
        raise SpecRejected(problems) from None
    problems += _clashes(spec)
    if problems:
        raise SpecRejected(problems)
    return spec, notes  # type: ignore[return-value]  # KINDS holds exactly JobSpec's members


def _kind(document: Mapping[str, Any]) -> str:
    if not isinstance(document, Mapping):
        raise InputError("A job is an object of names and values.", code="not_an_object")
    kind = document.get("kind")
    if kind is None and {"stage", "do_train", "model_name_or_path", "dataset"} & set(document):
        return "finetune"
    if kind is None:
        raise SpecRejected([_missing("kind", f"one of {', '.join(KINDS)}")])
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(KINDS)}"
        message = f"There is no kind {str(kind)[:60]!r}."
        raise SpecRejected([InputError(message, code="bad_choice", field="kind", hint=hint)])
    return str(kind)


def _normalise(
    document: Mapping[str, Any], model: type[Spec]
) -> tuple[dict[str, Any], list[Note], list[InputError]]:
    """Our names for other names, unset for null, and what to say about the rest."""
    values: dict[str, Any] = {}
    notes: list[Note] = []
    problems: list[InputError] = []
    for written, value in document.items():
        name = SAME_AS.get(written, written)
        if name in READ_ONLY:
            hint = "leave it out: the server sets it"
            problems.append(_problem("read_only_field", f"{written} cannot be set.", written, hint))
        elif name in model.model_fields:
            if name in values:
                message = f"{written} and {name} mean the same."
                problems.append(_problem("conflicting_fields", message, written, "give one"))
            if value is not None:
                values[name] = _lenient(value, model, name)
        elif written in WITHOUT_EFFECT:
            notes.append(Note(field=written, message=f"{written} changes nothing here"))
        elif written in NOT_YET:
            problems += _not_yet(written, value)
        else:
            problems.append(_unknown(written, model))
    problems += _odd_characters(values)
    return values, notes, problems


def _lenient(value: Any, model: type[Spec], name: str) -> Any:
    """YAML's habits: yes and no for a flag; a number in the words of a number."""
    if isinstance(value, str) and model.model_fields[name].annotation is bool:
        lowered = value.lower()
        return True if lowered in YES else False if lowered in NO else value
    return value


def _not_yet(name: str, value: Any) -> list[InputError]:
    default = NOT_YET[name]
    if value is None or value is False or (default is not ... and value == default):
        return []
    message = f"{name} = {str(value)[:60]} is not supported yet."
    return [_problem("not_supported_yet", message, name, "leave it out")]


def _unknown(written: object, model: type[Spec]) -> InputError:
    text = str(written)
    known = [*model.model_fields, *SAME_AS, *NOT_YET, *WITHOUT_EFFECT]
    simple = re.sub(r"[^a-z0-9]+", "_", text.lower())
    near = difflib.get_close_matches(simple, model.model_fields, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(simple, known, n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"docs/reference lists the fields of {model.__name__}"
    )
    return _problem("unknown_field", f"There is no field {text[:80]!r}.", text[:80], hint)


def _odd_characters(values: Mapping[str, Any]) -> list[InputError]:
    """NUL and lone surrogates, which the database cannot hold, and numbers that are none."""
    found = []
    for name, value in values.items():
        for leaf in _leaves(value):
            if isinstance(leaf, str) and re.search("[\x00\ud800-\udfff]", leaf):
                message = f"{name} holds a character that cannot be stored."
                found.append(_problem("bad_character", message, name, "remove NUL and surrogates"))
                break
            if isinstance(leaf, float) and not math.isfinite(leaf):
                found.append(_problem("not_finite", f"{name} is not a number.", name, None))
                break
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _problems(error: ValidationError, model: type[Spec]) -> Iterator[InputError]:
    """pydantic's findings in our words; of a union's several only the first."""
    seen = set()
    for found in error.errors(include_url=False):
        name = str(found["loc"][0]) if found["loc"] else "kind"
        if name in seen:
            continue
        seen.add(name)
        yield _translate(name, found, model)


def _translate(name: str, found: Any, model: type[Spec]) -> InputError:
    kind, context = found["type"], found.get("ctx", {})
    described = model.model_fields[name].description if name in model.model_fields else ""
    shown = repr(found.get("input"))[:60]
    if kind == "missing":
        return _missing(name, described or "")
    if kind == "value_error":
        text = str(context.get("error", found["msg"]))
        code = {"model_name": "bad_model_name"}.get(name, "bad_value")
        if "path" in text and name != "model_name":
            code = "path_not_allowed"
        if "control" in text:
            code = "bad_character"
        return _problem(code, f"{name} = {shown}: {text}.", name, described)
    if kind == "literal_error":
        message = f"{name} = {shown} is no choice: {context.get('expected')}."
        return _problem("bad_choice", message, name, described)
    if kind.startswith(("greater_than", "less_than", "too_", "string_too", "finite")):
        message = f"{name} = {shown} is out of range: {found['msg'].lower()}."
        return _problem("out_of_range", message, name, described)
    message = f"{name} = {shown} is of the wrong type: {found['msg'].lower()}."
    return _problem("wrong_type", message, name, described)


def _clashes(spec: Spec) -> list[InputError]:
    """Combinations that cannot work, as LLaMA-Factory would refuse them at its start."""
    if not isinstance(spec, FinetuneSpec):
        return []
    rules = [
        (spec.val_size > 0 and spec.eval_dataset is not None, "val_size", "eval_dataset"),
        (spec.train_on_prompt and spec.mask_history, "train_on_prompt", "mask_history"),
        (spec.bf16 and spec.fp16, "bf16", "fp16"),
        (spec.pure_bf16 and spec.fp16, "pure_bf16", "fp16"),
        (spec.warmup_ratio > 0 and spec.warmup_steps > 0, "warmup_ratio", "warmup_steps"),
        (
            spec.gradient_checkpointing and spec.disable_gradient_checkpointing,
            "gradient_checkpointing",
            "disable_gradient_checkpointing",
        ),
    ]
    found = [
        _problem("conflicting_fields", f"{a} and {b} exclude each other.", a, "give one of them")
        for clash, a, b in rules
        if clash
    ]
    if spec.max_steps == 0:
        found.append(
            _problem(
                "nothing_to_do", "max_steps = 0 trains nothing.", "max_steps", "-1 counts epochs"
            )
        )
    if spec.eval_strategy != "no" and not spec.val_size and spec.eval_dataset is None:
        hint = "set val_size or eval_dataset"
        found.append(
            _problem(
                "conflicting_fields", "There is nothing to evaluate on.", "eval_strategy", hint
            )
        )
    return found


def _missing(name: str, described: str) -> InputError:
    return _problem("missing_field", f"{name} is missing.", name, described or None)


def _problem(code: str, message: str, field: str, hint: str | None) -> InputError:
    return InputError(message, code=code, field=field, hint=hint)


def describe_fields() -> list[tuple[str, str, str, str]]:
    """(kind, field, default, sentence) of every field, for the reference page."""
    rows = []
    for kind, model in KINDS.items():
        for name, field in model.model_fields.items():
            default = (
                "required"
                if field.is_required()
                else repr(field.get_default(call_default_factory=True))
            )
            rows.append((kind, name, default, field.description or ""))
    return rows
