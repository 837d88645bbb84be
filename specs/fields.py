"""What all specs share: common fields, references to other things, and safe names."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from tuneyard.specs.ids import is_id

MAX_NAME = 200
MAX_TEXT = 65_536

_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,199}", re.ASCII)
_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_MARKS = frozenset("\u061c\u200e\u200f\u2028\u2029")
_PATH = re.compile(r"[/~.\\]|node:|file:|[A-Za-z]:[\\/]")
_WEIGHTS = (
    "a folder of weights is brought under a name first, `tuneyard download node:/PATH --name NAME`"
    " (docs/howto/own-model.md)"
)
_PATHS = (
    "a path in a YAML file is on the client's disk, and `tuneyard submit` uploads what it names; "
    "over HTTP upload the file first and name its id"
)


def refusal(code: str, text: str, hint: str | None = None) -> PydanticCustomError:
    """What a validator raises: ``code`` is the error's code on the wire."""
    context = {"text": text, "hint": hint}
    return PydanticCustomError(code, "{text}", context)


def check_text(text: str) -> str:
    """Refuse what no name may hold: control and direction characters."""
    for character in text:
        bidirectional = unicodedata.bidirectional(character)
        if (
            unicodedata.category(character) == "Cc"
            or bidirectional in _DIRECTIONS
            or character in _MARKS
        ):
            shown = f"U+{ord(character):04X}"
            raise refusal("bad_character", f"holds {shown}", "remove control characters")
    return text


def check_name(name: str) -> str:
    """A name of which something can be seen."""
    if all(unicodedata.category(c)[0] in "ZC" or c in _BLANK for c in check_text(name)):
        raise refusal("bad_name", "shows nothing", "give it letters")
    return name


_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and signs, by their category, that are drawn as nothing."""


def check_model_name(name: str) -> str:
    """Refuse what could be a path, an option or a command."""
    if not _MODEL_NAME.fullmatch(name) or ".." in name or "//" in name:
        letters = f"letters, digits and . _ : / - up to {MAX_NAME}"
        hint = _WEIGHTS if _PATH.match(name) else letters
        raise refusal("bad_model_name", "is no name of a model", hint)
    return name


def check_adapter_name(name: str) -> str:
    """As a model's name; a path is told apart."""
    if _PATH.match(name):
        raise refusal("path_not_allowed", "is a path", "name a tuned model or {from: a job}")
    if "," in name:
        raise refusal("not_supported_yet", "names several adapters", "one adapter a job")
    return check_model_name(name)


def check_file_name(name: str) -> str:
    """Refuse paths: over HTTP they would be the server's, which is never what was meant."""
    if _PATH.match(name) or "/" in name or "\\" in name:
        raise refusal("path_not_allowed", "is a path", _PATHS)
    if "," in name:
        raise refusal("not_supported_yet", "names several files", "join them into one")
    return check_text(name)


def model_name_of(name: str) -> str:
    """What a job's name becomes as the name of its model, so that a spec can say it.

    >>> model_name_of("support tone #2"), model_name_of("客服")
    ('support-tone-2', '')
    """
    plain = re.sub(r"[^\w.:/-]+", "-", name, flags=re.ASCII)
    plain = re.sub(r"([./-])\1+", r"\1", plain)
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", plain)[:180]


def _check_output(name: str) -> str:
    job, _, output = name.partition(".")
    if not is_id("job", job) or (output and not re.fullmatch("[a-z_]{1,40}", output)):
        raise refusal("bad_id", "is no job", 'for example {"from": "job_…"} or "job_….adapter"')
    return name


class Source(BaseModel):
    """Another job's output as an input: {"from": "job_…"} or {"from": "job_….adapter"}."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    from_: Annotated[str, AfterValidator(_check_output)] = Field(alias="from")


def _check_one(value: Any) -> Any:
    """Several in a list would be met with what a reference may look like."""
    if isinstance(value, list):
        raise refusal("not_supported_yet", "names several files", "join them into one")
    return value


def _form(value: Any) -> str:
    return "<source>" if isinstance(value, Mapping | Source) else "<name>"


def _form_of_texts(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


_Given = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_FromJob = Annotated[Source, Tag("<source>")]

Name = Annotated[_Given, AfterValidator(check_name)]
ModelName = Annotated[str, Field(min_length=1), AfterValidator(check_model_name)]
ModelRef = Annotated[
    Annotated[_Given, AfterValidator(check_model_name), Tag("<name>")] | _FromJob,
    Discriminator(_form),
]
"""A model: an id, a name, or {"from": job}."""
AdapterRef = Annotated[
    Annotated[_Given, AfterValidator(check_adapter_name), Tag("<name>")] | _FromJob,
    Discriminator(_form),
]
"""An adapter: an id, the name of a tuned model, or {"from": job}."""
FileRef = Annotated[
    Annotated[_Given, AfterValidator(check_file_name), Tag("<name>")] | _FromJob,
    Discriminator(_form),
    BeforeValidator(_check_one),
]
"""An upload: its id, its name, or {"from": job}."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Word = Annotated[str, Field(min_length=1, max_length=1000)]
Words = Annotated[
    Annotated[Word, Tag("<text>")]
    | Annotated[list[Word], Field(min_length=1, max_length=1000), Tag("<list>")],
    Discriminator(_form_of_texts),
]
"""A text, or a list of texts."""


def words_in(value: str | Sequence[str] | None) -> list[str]:
    """Words as a list, where they may stand in one text with commas between them.

    >>> words_in("q_proj, v_proj"), words_in(["all"]), words_in(None)
    (['q_proj', 'v_proj'], ['all'], [])
    """
    words = value.split(",") if isinstance(value, str) else list(value or ())
    return [word.strip() for word in words if word.strip()]


def check_data_file(name: str) -> str:
    """Refuse what is no name of a file within a data set."""
    parts = check_text(name).split("/")
    if "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise refusal("path_not_allowed", "is no file within a data set", "such as data/train.json")
    return name


DataFile = Annotated[str, Field(min_length=1, max_length=400), AfterValidator(check_data_file)]
"""A file within a data set that was downloaded."""


class Reference(BaseModel):
    """A thing that a spec names.

    what: a model to ask (an adapter brings its base along), a base that must be whole, the base of
    the named adapter, an adapter, a model that scores (an adapter brings its base along, as
    ``reward_base``), or a file. fits: fields of adapters that must have been tuned over it. use:
    what an adapter must be fit for, in the words of specs/tuning.py. data_file: which file of a
    data set that has several.
    """

    model_config = ConfigDict(frozen=True)
    field: str
    what: Literal["model", "base", "base_of", "adapter", "reward_model", "dataset", "prompts"]
    value: str | dict[str, str]
    fits: tuple[str, ...] = ()
    use: str | None = None
    data_file: str | None = None


def given(value: str | Source) -> str | dict[str, str]:
    """A reference as it was written."""
    return {"from": value.from_} if isinstance(value, Source) else value


DATA_FILES = {"dataset": "data_file", "eval_dataset": "eval_data_file"}
"""Field that names a data set -> field that picks one of its files."""


WHAT: dict[str, Literal["model", "adapter", "reward_model", "dataset", "prompts"]] = {
    "model": "model",
    "ref_model": "model",
    "ref_model_adapters": "adapter",
    "reward_model": "reward_model",
    "adapter": "adapter",
    "dataset": "dataset",
    "eval_dataset": "dataset",
    "prompts": "prompts",
}
"""Field -> what it names."""

OF_THE_JOB = frozenset(
    {"kind", "name", "priority", "device", "gpus", "max_runtime_s", "metadata", "from_scratch"}
    | {"export_dir", "output_dir"}
)
"""Fields that the scheduler reads; the rest is the runner's."""


class Spec(BaseModel):
    """What every kind of job may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    adapter_as_model: ClassVar[bool] = True  # whether `model` may name an adapter over its base

    kind: str
    name: Name | None = Field(None, description="A name for people; need not be unique.")
    priority: int = Field(50, ge=0, le=100, description="Higher ones are placed first.")
    device: Literal["auto", "gpu", "cpu"] = Field(
        "auto", description="auto: a GPU where the cluster has any."
    )
    gpus: int = Field(1, ge=1, le=64, description="GPUs of one node.")
    max_runtime_s: int | None = Field(
        None, ge=1, le=10**9, description="Seconds that all attempts together may run."
    )
    metadata: dict[
        Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]
    ] = Field(default_factory=dict, max_length=16, description="Anything of yours.")
    from_scratch: bool = Field(False, description="A retry does not go on from a checkpoint.")

    def differs(self, name: str) -> bool:
        """Whether a field says something else than it does unset."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default())

    def document(self) -> dict[str, Any]:
        """The spec as it was asked for, in its normal form; ``read_spec`` reads it back."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"kind": self.kind}

    def arguments(self) -> dict[str, Any]:
        """The runner's arguments, all defaults filled in."""
        full = self.model_dump(mode="json", by_alias=True)
        named = {reference.field for reference in self.references()}
        return {k: v for k, v in full.items() if k not in OF_THE_JOB and k not in named}

    def references(self) -> list[Reference]:
        """The things that this spec names."""
        found = []
        for field, what in WHAT.items():
            value = getattr(self, field, None)
            if isinstance(value, str | Source):
                kind = "base" if what == "model" and not self.adapter_as_model else what
                picked = getattr(self, DATA_FILES.get(field, ""), None)
                found.append(
                    Reference(field=field, what=kind, value=given(value), data_file=picked)
                )
        return self._spoken(found) if self.adapter_as_model else found

    def _spoken(self, found: list[Reference]) -> list[Reference]:
        """An adapter that a base is asked with is one that speaks, and was tuned over that base.

        It is named by ``adapter``, or is what ``model`` comes to.
        """
        over = tuple(each.field for each in found if each.field == "adapter")
        more = {"adapter": {"use": "speak"}, "model": {"fits": over} if over else {"use": "speak"}}
        return [each.model_copy(update=more.get(each.field, {})) for each in found]

    @property
    def wants_gpu(self) -> bool:
        """Whether ``auto`` means a GPU for this kind."""
        return False
