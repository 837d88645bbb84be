"""What ``kind: evaluate`` may say: LLaMA-Factory's do_eval and do_predict without do_train."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import AdapterRef, FileRef
from tuneyard.specs.finetune import RowsSpec, Stage
from tuneyard.specs.numbers import PRECISION, CountOrShare, Precision, format_clashes
from tuneyard.specs.predicting import PredictingFields, predicting_clashes
from tuneyard.specs.problems import exclude, problem


class EvaluateSpec(PredictingFields, RowsSpec):
    """Measure a base model, or a tuned one, on rows with answers. Nothing is trained."""

    adapter_as_model: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    adapter: AdapterRef | None = Field(None, description="An adapter over that base.")
    dataset: FileRef | None = Field(  # type: ignore[assignment]  # eval_dataset may do
        None, description="With val_size: the rows that a fine-tune of this seed holds out."
    )
    stage: Stage = Field(
        "sft", description="sft: other stages are measured while they are learned."
    )
    val_size: CountOrShare = Field(0.0, description="Share (below 1) or number of rows of dataset.")
    do_train: bool = Field(False, description="kind: finetune trains.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="What is drawn follows from it.")
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="Rows at a time.")
    precision: Precision = PRECISION
    bf16: bool = Field(False, description="Weights in bfloat16.")
    fp16: bool = Field(False, description="Weights in half precision.")
    pure_bf16: bool = Field(False, description="As bf16.")

    @property
    def wants_gpu(self) -> bool:
        """Measuring goes to a GPU where there is one."""
        return True

    @property
    def held_out(self) -> bool:
        """Whether there are rows to measure."""
        return self.eval_dataset is not None or (self.dataset is not None and self.val_size > 0)


def evaluate_clashes(spec: EvaluateSpec, *, held_out: bool, separate: bool) -> Iterator[InputError]:
    """What leaves nothing to measure, or says two things.

    held_out: there are rows to measure; separate: in a data set of their own.
    """
    yield from predicting_clashes(spec, stage=spec.stage, held_out=held_out)
    if not (spec.do_eval or spec.do_predict):
        message, hint = "There is nothing to measure.", "do_eval: true, or do_predict: true"
        yield problem("nothing_to_do", message, "do_eval", hint)
    if spec.stage != "sft":
        message = f"stage {spec.stage} is measured while it is learned."
        yield problem("not_supported_yet", message, "stage", "sft")
    if spec.do_train:
        message = "An evaluation trains nothing."
        yield problem("conflicting_fields", message, "do_train", "kind: finetune")
    if spec.val_size and separate:
        yield exclude("val_size", "eval_dataset")
    yield from format_clashes(spec)
