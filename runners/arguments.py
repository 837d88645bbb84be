"""Arguments of the runners: those of the specs, with the same defaults.

They come checked from a submission; here they are checked again for a runner started by hand, which
says in its inputs what a submission names by id.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.failures import BadSpec
from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.evaluate import EvaluateSpec
from tuneyard.specs.fields import OF_THE_JOB, WHAT
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.merge import MergeSpec
from tuneyard.specs.numbers import Precision
from tuneyard.specs.prepare import PrepareSpec
from tuneyard.specs.problems import problems_of
from tuneyard.specs.sources import Hub

Arguments = TypeVar("Arguments", bound=BaseModel)
Way = Literal["padded", "segments", "varlen"]
"""How examples stand in rows; runners/attention.py tells them apart."""

_BESIDE = OF_THE_JOB | WHAT.keys() | {
    "do_train", "model_name", "model_name_or_path", "not_before", "share", "suffix",
}  # fmt: skip
"""Fields of a submission that stand beside the runner's arguments and are not for it."""

_BY_HAND = ConfigDict(extra="ignore", strict=False)


class PrepareArguments(PrepareSpec):
    """What `kind: prepare` may say: what decides about tokens."""

    model_config = _BY_HAND
    model: Any = None
    dataset: Any = None


class FinetuneArguments(FinetuneSpec):
    """What `kind: finetune` may say."""

    model_config = _BY_HAND
    model: Any = None
    ref_model: Any = None
    ref_model_adapters: Any = None
    reward_model: Any = None
    dataset: Any = None
    seed: int | None = None  # type: ignore[assignment]  # None: the spec's
    attention: Way | None = None  # None: the fastest that is known to be right

    @property
    def alpha(self) -> int:
        """lora_alpha, or LLaMA-Factory's default for it."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def of_the_runner(self) -> dict[str, Any]:
        """What was asked of the runner, defaults filled in."""
        return {name: value for name, value in self.arguments().items() if name not in WHAT}


class InferArguments(InferenceSpec):
    """What `kind: inference` may say; None leaves a setting to the model's own files."""

    model_config = _BY_HAND
    model: Any = None
    prompts: Any = None  # a list of them, where inputs name no file
    seed: int | None = None  # type: ignore[assignment]  # None: the spec's
    precision: Precision = "auto"


class EvaluateArguments(EvaluateSpec):
    """What `kind: evaluate` may say."""

    model_config = _BY_HAND
    model: Any = None
    dataset: Any = None
    seed: int | None = None  # type: ignore[assignment]  # None: the spec's


class MergeArguments(MergeSpec):
    """What `kind: merge` may say; the worker has chosen by export_device."""

    model_config = _BY_HAND
    adapter: Any = None


class ServeArguments(InferArguments):
    """What `kind: serve` may say; each question may say otherwise how it is to be answered."""

    default_system: str | None = None  # None: the one that trained
    idle_s: float = Field(600.0, gt=0)


class DownloadArguments(DownloadSpec):
    """What `kind: download` may say, and where things are on this node."""

    model_config = _BY_HAND
    source: str  # by hand also a folder
    model_name: Any = None
    hubs: Sequence[Hub] = ("modelscope", "huggingface")
    cache: str | None = None  # None: within WORKDIR
    caches: Sequence[str] = ()  # of the hubs' own clients on this node
    node_roots: Sequence[str] = ()
    disk_floor_bytes: int = Field(0, ge=0)
    copied: bool = False  # the store is on the cache's disk
    stall_s: float = Field(300.0, gt=0)


def arguments_of(attempt: Attempt, model: type[Arguments]) -> Arguments:
    """The attempt's arguments; a warning names those that nothing here knows. Raises: BadSpec."""
    arguments, unknown = read_arguments(model, attempt.spec.arguments)
    if unknown:
        attempt.events.warn("arguments_ignored", f"Not used here: {', '.join(unknown)}.")
    return arguments


def read_arguments(
    model: type[Arguments], given: Mapping[str, Any]
) -> tuple[Arguments, Sequence[str]]:
    """Check arguments; null means the default. Also the names that nothing here knows.

    Raises: BadSpec, with the field.
    """
    said = {name: value for name, value in given.items() if value is not None}
    try:
        arguments = model.model_validate(said)
    except ValidationError as error:
        first = next(problems_of(error, model))
        raise BadSpec(first.message, field=first.field, hint=first.hint) from None
    return arguments, sorted(said.keys() - model.model_fields.keys() - _BESIDE)
