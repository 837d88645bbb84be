"""What all specs share: common fields, references to other things, and safe names."""

import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MAX_NAME = 200


class Source(BaseModel):
    """Another job's output as an input: {"from": "job_…"} or {"from": "job_….adapter"}."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    from_: str = Field(alias="from", min_length=1, max_length=200)


def check_text(text: str) -> str:
    """Refuse what no name may hold: control and direction characters."""
    for character in text:
        if unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _BIDI:
            raise ValueError("control and direction characters are not allowed")
    return text


def check_model_name(name: str) -> str:
    """Refuse what could be a path or an option."""
    if not _MODEL_NAME.fullmatch(name) or ".." in name or "//" in name:
        raise ValueError("letters, digits and . _ : / - are allowed, no path")
    return name


def check_reference(name: str) -> str:
    """Refuse paths: over HTTP they would be the server's, which is never what was meant."""
    if name.startswith(("/", "./", "../", "~", "node:", "file:")) or "\\" in name or ".." in name:
        raise ValueError(
            "a path is not allowed here: `tuneyard submit` uploads files of a YAML's folder; "
            "over HTTP upload the file first and name its id"
        )
    return check_text(name)


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(check_text)]
ModelName = Annotated[str, Field(min_length=1), AfterValidator(check_model_name)]
Ref = (
    Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(check_reference)]
    | Source
)
"""An id, a name, or {"from": job}."""


class Reference(BaseModel):
    """A thing that a spec names. what: model, adapter, dataset or prompts."""

    model_config = ConfigDict(frozen=True)
    field: str
    what: Literal["model", "adapter", "dataset", "prompts"]
    value: str | dict[str, str]


WHAT: dict[str, Literal["model", "adapter", "dataset", "prompts"]] = {
    "model": "model",
    "adapter": "adapter",
    "dataset": "dataset",
    "eval_dataset": "dataset",
    "prompts": "prompts",
}
"""Field -> what it names."""

OF_THE_JOB = frozenset(
    {"kind", "name", "priority", "device", "gpus", "max_runtime_s", "metadata", "from_scratch"}
)
"""Fields that the scheduler reads; the rest is the runner's."""


class Spec(BaseModel):
    """What every kind of job may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    kind: str
    name: Name | None = Field(None, description="A name for people; need not be unique.")
    priority: int = Field(50, ge=0, le=100, description="Higher ones are placed first.")
    device: Literal["auto", "gpu", "cpu"] = Field(
        "auto", description="auto: a GPU where the cluster has any."
    )
    gpus: int = Field(1, ge=1, le=64, description="GPUs of one node.")
    max_runtime_s: int | None = Field(
        None, ge=1, description="Seconds that all attempts together may run."
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default_factory=dict, max_length=16, description="Anything of yours.")
    )
    from_scratch: bool = Field(False, description="A retry does not go on from a checkpoint.")

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
            if isinstance(value, Source):
                value = {"from": value.from_}
            if isinstance(value, str | dict):
                found.append(Reference(field=field, what=what, value=value))
        return found

    @property
    def wants_gpu(self) -> bool:
        """Whether ``auto`` means a GPU for this kind."""
        return False

    def replaced(self, **changes: Any) -> Self:
        """A copy with other values, checked anew."""
        return type(self).model_validate(self.document() | changes)
