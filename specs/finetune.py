"""What ``kind: finetune`` may say: LLaMA-Factory's and transformers' names, with their defaults."""

from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.specs.evaluating import EvaluatingFields
from tuneyard.specs.fields import DataFile, FileRef, ModelRef, Reference, Spec, Text
from tuneyard.specs.numbers import Positive
from tuneyard.specs.optimizers import OptimizerFields
from tuneyard.specs.optimizing import OptimizingFields
from tuneyard.specs.predicting import PredictingFields
from tuneyard.specs.preferences import WITHOUT_REFERENCE, PreferenceFields
from tuneyard.specs.rewards import ONLINE, RewardFields
from tuneyard.specs.tracking import TrackingFields
from tuneyard.specs.tuning import SHAPING, TuningFields
from tuneyard.specs.watching import WatchingFields

TEMPLATES = (
    "alpaca", "chatml", "chatml_de", "cohere", "cpm4", "deepseek", "deepseek3", "default",
    "exaone", "falcon_h1", "gemma", "gemma3", "granite3", "llama2", "llama3", "mistral", "olmo",
    "openchat", "opencoder", "phi", "phi4", "phi4_mini", "qwen", "qwen3", "qwen3_nothink",
    "smollm", "smollm2", "starchat", "vicuna", "yi", "zephyr",
)  # fmt: skip
"""Chat templates that come along: they write what LLaMA-Factory's of these names write."""


Stage = Literal["sft", "pt", "rm", "dpo", "kto", "grpo", "rloo"]


class RowsSpec(Spec):
    """Which rows of which data a base learns, as which tokens."""

    adapter_as_model: ClassVar[bool] = False

    model: ModelRef = Field(description="The base model: an id, a name, or {from: a job}.")
    dataset: FileRef = Field(
        description="The training data: id or name of a file, or {from: a download of a data set}."
    )
    data_file: DataFile | None = Field(
        None, description="Which file of a downloaded data set that has several."
    )
    eval_dataset: FileRef | None = Field(None, description="Rows to evaluate on.")
    eval_data_file: DataFile | None = Field(None, description="The same for eval_dataset.")
    stage: Stage = Field("sft", description="What is learned from the rows.")
    template: Text | None = Field(
        None,
        description="Chat template, by LLaMA-Factory's name, or jinja; unset: the tokenizer's own.",
    )
    default_system: Text | None = Field(None, description="System text where a row has none.")
    cutoff_len: int = Field(2048, ge=8, le=1_048_576, description="Tokens kept of a row.")
    train_on_prompt: bool = Field(False, description="Learn questions as well as answers.")
    mask_history: bool = Field(False, description="Learn a row's last answer only.")
    packing: bool | None = Field(
        None,
        description="Several rows count as one, which they fill up to cutoff_len; each sees those "
        "before it. Stage pt joins texts and cuts them every cutoff_len tokens; unset: pt does.",
    )
    neat_packing: bool = Field(
        False, description="Packing in which no row sees another; stage sft only."
    )
    max_samples: Positive | None = Field(None, description="Rows used at most.")

    @property
    def packs_rows(self) -> bool:
        """Whether several rows count as one; texts of stage pt are joined in a way of their own."""
        return self.stage == "sft" and bool(self.packing or self.neat_packing)

    @property
    def tokens_kept(self) -> int:
        """Tokens that a row has at most: LLaMA-Factory leaves one out of cutoff_len in a pack."""
        return self.cutoff_len - 1 if self.packs_rows else self.cutoff_len


class FinetuneSpec(
    TrackingFields,
    WatchingFields,
    PredictingFields,
    EvaluatingFields,
    OptimizerFields,
    OptimizingFields,
    PreferenceFields,
    RewardFields,
    TuningFields,
    RowsSpec,
):
    """Tune a base model on a data set."""

    kind: Literal["finetune"] = "finetune"
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Everything random follows from it.")
    output_dir: Text | None = Field(
        None, description="What a merge's adapter_name_or_path may call the result."
    )

    @property
    def wants_gpu(self) -> bool:
        """Tuning goes to a GPU where there is one."""
        return True

    @property
    def measures(self) -> bool:
        """Whether held-out rows are measured at all."""
        return self.do_eval or self.eval_strategy != "no"

    @property
    def compares(self) -> bool:
        """Whether the stage compares answers with another model's view of them."""
        if self.stage in ONLINE:
            return self.distance_weight > 0
        alone = self.pref_loss in WITHOUT_REFERENCE
        return self.stage == "kto" or (self.stage == "dpo" and not alone)

    def references(self) -> list[Reference]:
        """The base and the data, then the adapters to go on from: adapter, adapter_2, …"""
        found = [each for each in super().references() if each.field != "adapter"]
        adapters = []
        for number, value in enumerate(self.adapters, start=1):
            field = "adapter" if number == 1 else f"adapter_{number}"
            last = number == len(self.adapters) and self.goes_on
            use = self.finetuning_type if last else "sum"
            adapters.append(Reference(field=field, what="adapter", value=value, use=use))
        fits = tuple(each.field for each in adapters)
        under = {"model": fits}
        if self.ref_model_adapters is not None:
            compared = "model" if self.ref_model is None else "ref_model"
            under[compared] = (*under.get(compared, ()), "ref_model_adapters")
        found = [
            r.model_copy(
                update={"fits": under.get(r.field, ())}
                | ({"use": _USES[r.field]} if r.field in _USES else {})
            )
            for r in found
        ]
        return [*found, *adapters]


_USES = {"reward_model": "reward", "ref_model_adapters": "speak"}
"""Field that names what was tuned -> what it must be fit for."""

SHAPE_A_CHECKPOINT = (
    {"kind"}
    | (RowsSpec.model_fields.keys() - Spec.model_fields.keys() - {"eval_dataset", "eval_data_file"})
    | {"val_size", "seed"}
    | SHAPING
    | (OptimizerFields.model_fields.keys() - Spec.model_fields.keys() - {"badam_verbose"})
)
"""Fields that a checkpoint's rows, adapter, its scale and moments follow from."""


def shapers_changed(before: Spec, after: Spec) -> list[str]:
    """Which fields of a fine-tune changed so that its checkpoints fit no more."""
    if not isinstance(before, FinetuneSpec):
        return []
    names = sorted(SHAPE_A_CHECKPOINT)
    changed = [name for name in names if getattr(before, name) != getattr(after, name, None)]
    if isinstance(after, FinetuneSpec) and after.max_steps <= 0:
        # Steps are counted by epochs: those that a checkpoint has would stand for other rows.
        return changed + _rows_changed(before, after)
    return changed


def _rows_changed(before: FinetuneSpec, after: FinetuneSpec) -> list[str]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = {
        each.per_device_train_batch_size * each.gradient_accumulation_steps
        for each in (before, after)
    }
    return [n for n in names if len(rows) > 1 and getattr(before, n) != getattr(after, n)]
