"""What ``kind: merge`` may say: LLaMA-Factory's export, by its names."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tuneyard.specs.fields import (
    AdapterRef,
    ModelName,
    ModelRef,
    Reference,
    Spec,
    Text,
    check_text,
    given,
    refusal,
)
from tuneyard.specs.tuning import PROMPTS, WHOLE

Folder = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_text)]


def _mergeable(value: Any) -> Any:
    """What leaves nothing to be merged says what to do instead."""
    if isinstance(value, str) and value in WHOLE:
        raise refusal(
            "not_mergeable", "leaves a whole model", "ask it, or tune it on, as it is: model: …"
        )
    if isinstance(value, str) and value.replace("-", "_") in PROMPTS:
        raise refusal("not_mergeable", "is no change of weights", "ask it as an adapter: model: …")
    return value


class MergeSpec(Spec):
    """Make an adapter and its base into a model that stands alone."""

    adapter_as_model: ClassVar[bool] = False

    kind: Literal["merge"] = "merge"
    adapter: AdapterRef = Field(description="The adapter: an id, a name, or {from: a job}.")
    model: ModelRef | None = Field(None, description="Its base; unset: the one it was tuned over.")
    model_name: ModelName | None = Field(
        None, description="What the result is called; unset: the job's name."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Format of the weights; auto: the base's, bfloat16 for one in float32."
    )
    force: bool = Field(False, description="Merge onto another base than the adapter's, if told.")
    template: Text | None = Field(
        None, description="Chat template, where neither adapter nor base brings one."
    )
    finetuning_type: Annotated[
        Literal["lora", "oft", "adalora", "vera", "ia3"], BeforeValidator(_mergeable)
    ] = Field("lora", description="What the adapter is.")
    export_dir: Folder | None = Field(
        None, description="Folder of yours that `--wait` writes the result to."
    )
    export_size: float = Field(5, gt=0, le=1000, description="Gigabytes (10^9) of a file at most.")
    export_device: Literal["cpu", "auto"] = Field(
        "cpu", description="auto: a GPU where the cluster has any."
    )
    export_legacy_format: bool = Field(False, description="Accepted; safetensors are written.")

    @property
    def wants_gpu(self) -> bool:
        """Merging is a CPU's affair unless ``export_device`` says otherwise."""
        return self.export_device == "auto"

    def references(self) -> list[Reference]:
        """The adapter, then its base: the adapter's own, or one that must equal it."""
        adapter, own = given(self.adapter), self.model is None
        named = adapter if self.model is None else given(self.model)
        base = Reference(
            field="model",
            what="base_of" if own else "base",
            value=named,
            fits=() if own or self.force else ("adapter",),
        )
        return [Reference(field="adapter", what="adapter", value=adapter, use="merge"), base]
