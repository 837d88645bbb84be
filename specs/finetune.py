"""What ``kind: finetune`` may say: LLaMA-Factory's and transformers' names, with their defaults."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.fields import DataFile, FileRef, ModelRef, Spec, Text, Words, refusal

Strategy = Literal["no", "steps", "epoch"]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
SCHEDULE_OPTIONS: Mapping[str, frozenset[str]] = {
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "inverse_sqrt": frozenset({"timescale"}),
}
"""Schedule -> names that its ``lr_scheduler_kwargs`` may hold; others take none."""

TEMPLATES = ("alpaca", "chatml")
"""Chat templates that come along, for bases that have none."""

MOST = 10**9


def _whole_from_one(number: float) -> float:
    if number >= 1 and number != int(number):
        raise refusal("out_of_range", "is neither below 1 nor whole", "below 1 it is a share")
    return number


def _each_once(layers: list[int]) -> list[int]:
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise refusal("out_of_range", f"names layer {twice} twice", "name each layer once")
    return layers


Positive = Annotated[int, Field(ge=1, le=MOST)]
Share = Annotated[float, Field(ge=0, lt=1)]
CountOrShare = Annotated[float, Field(ge=0, le=MOST), AfterValidator(_whole_from_one)]
StepsOrShare = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_whole_from_one)]


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
    stage: Literal["sft"] = Field("sft", description="What is learned from the rows.")
    template: Text | None = Field(
        None,
        description="Chat template of a base that has none: alpaca, chatml, or jinja; unset: "
        "the tokenizer's own.",
    )
    default_system: Text | None = Field(None, description="System text where a row has none.")
    cutoff_len: int = Field(2048, ge=8, le=1_048_576, description="Tokens kept of a row.")
    train_on_prompt: bool = Field(False, description="Learn questions as well as answers.")
    mask_history: bool = Field(False, description="Learn a row's last answer only.")
    max_samples: Positive | None = Field(None, description="Rows used at most.")


class FinetuneSpec(RowsSpec):
    """Tune a base model on a data set."""

    kind: Literal["finetune"] = "finetune"
    val_size: CountOrShare = Field(0.0, description="Share (below 1) or number of rows held out.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Everything random follows from it.")

    output_dir: Text | None = Field(
        None, description="What a merge's adapter_name_or_path may call the result."
    )
    finetuning_type: Literal["lora"] = Field("lora", description="Which parameters learn.")
    lora_rank: int = Field(8, ge=1, le=1024, description="Rank of the adapter.")
    lora_alpha: int | None = Field(
        None, ge=1, le=10**6, description="Scale; unset: twice the rank."
    )
    lora_dropout: Share = Field(0.0, description="Dropout before the adapter.")
    lora_target: Words = Field(
        "all", description="Names of the layers that get an adapter; `all`: every linear one."
    )
    layers_to_transform: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=9_999)]],
            Field(min_length=1, max_length=1000),
            AfterValidator(_each_once),
        ]
        | None
    ) = Field(None, description="Indexes of the layers that get an adapter; unset: all.")
    additional_target: Words | None = Field(
        None, description="Modules that learn as a whole beside the adapter."
    )
    use_rslora: bool = Field(False, description="Scale by the root of the rank.")
    use_dora: bool = Field(False, description="Split weights into size and direction.")

    per_device_train_batch_size: int = Field(8, ge=1, le=4096, description="Rows at a time.")
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="The same, evaluating.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=65_536, description="Batches that make one optimizer step."
    )
    learning_rate: float = Field(5e-5, gt=0, le=10, description="Peak learning rate.")
    num_train_epochs: float = Field(3.0, gt=0, le=10_000, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, le=MOST, description="Optimizer steps; above 0 it counts.")
    lr_scheduler_type: Schedule = Field("linear", description="How the learning rate moves.")
    lr_scheduler_kwargs: dict[str, Annotated[float, Field(ge=0, le=MOST)]] | None = Field(
        None, description="Its options, for example num_cycles or min_lr."
    )
    warmup_steps: CountOrShare = Field(0, description="Warm-up in steps, or below 1 as a share.")
    warmup_ratio: Share = Field(0.0, description="Warm-up as a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's weight decay.")
    adam_beta1: Share = Field(0.9, description="AdamW's first moment.")
    adam_beta2: Share = Field(0.999, description="AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, le=MOST, description="Gradients are clipped to it; 0: never."
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=10_000, description="Noise on embeddings."
    )
    disable_shuffling: bool = Field(False, description="Keep the rows in their order.")

    bf16: bool = Field(False, description="Weights in bfloat16, the adapter in fp32.")
    fp16: bool = Field(False, description="Weights in half precision.")
    pure_bf16: bool = Field(False, description="Weights and adapter in bfloat16.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    disable_gradient_checkpointing: bool = Field(False, description="Never do that.")

    logging_steps: StepsOrShare = Field(1, description="Steps between lines of the log.")
    save_strategy: Strategy = Field("steps", description="When checkpoints are saved.")
    save_steps: StepsOrShare = Field(500, description="Steps between checkpoints; below 1 a share.")
    save_total_limit: Positive | None = Field(None, description="Checkpoints kept; unset: 2.")
    eval_strategy: Strategy = Field("no", description="When the held-out rows are evaluated.")
    eval_steps: StepsOrShare | None = Field(None, description="Steps between evaluations.")

    @property
    def wants_gpu(self) -> bool:
        """Tuning goes to a GPU where there is one."""
        return True


SHAPE_A_CHECKPOINT = (
    {"kind"}
    | (RowsSpec.model_fields.keys() - Spec.model_fields.keys() - {"eval_dataset", "eval_data_file"})
    | {"val_size", "seed", "finetuning_type"}
    | {"lora_rank", "lora_alpha", "lora_target", "layers_to_transform", "additional_target"}
    | {"use_rslora", "use_dora"}
)
"""Fields that a checkpoint's rows, adapter and its scale follow from; with others none fits."""


def shapers_changed(before: Spec, after: Spec) -> list[str]:
    """Which fields of a fine-tune changed so that its checkpoints fit no more."""
    if not isinstance(before, FinetuneSpec):
        return []
    names = sorted(SHAPE_A_CHECKPOINT)
    return [name for name in names if getattr(before, name) != getattr(after, name, None)]
