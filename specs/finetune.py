"""What ``kind: finetune`` may say: LLaMA-Factory's and transformers' names, with their defaults."""

from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.specs.evaluating import EvaluatingFields
from tuneyard.specs.fields import DataFile, FileRef, ModelRef, Reference, Spec, Text
from tuneyard.specs.numbers import Positive
from tuneyard.specs.optimizers import OptimizerFields
from tuneyard.specs.optimizing import OptimizingFields
from tuneyard.specs.preferences import PreferenceFields
from tuneyard.specs.tuning import SHAPING, TuningFields

TEMPLATES = ("alpaca", "chatml")
"""Chat templates that come along, for bases that have none."""


Stage = Literal["sft", "pt", "rm", "dpo", "kto"]


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
        description="Chat template of a base that has none: alpaca, chatml, or jinja; unset: "
        "the tokenizer's own.",
    )
    default_system: Text | None = Field(None, description="System text where a row has none.")
    cutoff_len: int = Field(2048, ge=8, le=1_048_576, description="Tokens kept of a row.")
    train_on_prompt: bool = Field(False, description="Learn questions as well as answers.")
    mask_history: bool = Field(False, description="Learn a row's last answer only.")
    packing: bool | None = Field(
        None, description="Stage pt: join texts and cut them every cutoff_len tokens; unset: yes."
    )
    max_samples: Positive | None = Field(None, description="Rows used at most.")


class FinetuneSpec(
    EvaluatingFields,
    OptimizerFields,
    OptimizingFields,
    PreferenceFields,
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
        found = [r.model_copy(update={"fits": fits}) if r.field == "model" else r for r in found]
        return [*found, *adapters]


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
    return [name for name in names if getattr(before, name) != getattr(after, name, None)]
