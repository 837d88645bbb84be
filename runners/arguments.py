"""Arguments of the runners, with LLaMA-Factory's and transformers' names and defaults.

They come checked from a submission; here they are checked again for a runner started by hand.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneyard.runners.failures import BadSpec

Arguments = TypeVar("Arguments", bound=BaseModel)

Strategy = Literal["no", "steps", "epoch"]

_OF_THE_JOB = {
    "adapter", "dataset", "device", "do_train", "eval_dataset", "gpus", "kind", "model",
    "model_name", "model_name_or_path", "name", "not_before", "output_dir", "priority", "prompts",
    "share", "suffix",
}  # fmt: skip
"""Fields of a submission that stand beside the runner's arguments and are not for it."""


class FinetuneArguments(BaseModel):
    """What `kind: finetune` may say."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    stage: Literal["sft"] = "sft"
    finetuning_type: Literal["lora"] = "lora"

    lora_rank: int = Field(8, ge=1)
    lora_alpha: float | None = None  # None: twice the rank
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: str | list[str] = "all"
    layers_to_transform: list[int] | None = None
    additional_target: str | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    template: str | None = None
    default_system: str | None = None
    cutoff_len: int = Field(2048, ge=2)
    train_on_prompt: bool = False
    mask_history: bool = False
    max_samples: int | None = Field(None, ge=1)
    val_size: float = Field(0.0, ge=0)

    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int = -1
    disable_shuffling: bool = False
    seed: int | None = None  # None: the spec's

    learning_rate: float = Field(5e-5, ge=0)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, float] | None = None
    warmup_steps: float = Field(0, ge=0)  # below 1: a share of all steps
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = Field(1.0, ge=0)  # 0: no clipping
    neftune_noise_alpha: float | None = None

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    bf16: bool = False
    fp16: bool = False
    pure_bf16: bool = False
    gradient_checkpointing: bool = False
    disable_gradient_checkpointing: bool = False

    logging_steps: float = Field(1, gt=0)
    save_strategy: Strategy = "steps"
    save_steps: float = Field(500, gt=0)  # below 1: a share of all steps
    save_total_limit: int | None = Field(None, ge=1)  # None: the last two
    eval_strategy: Strategy | None = None  # None: steps where eval_steps is set
    eval_steps: float | None = Field(None, gt=0)

    @property
    def alpha(self) -> float:
        """lora_alpha, or LLaMA-Factory's default for it."""
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return int(alpha) if alpha == int(alpha) else alpha


class InferArguments(BaseModel):
    """What `kind: inference` may say; None leaves a setting to the model's own files."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    prompts: Any = None  # a list of them, where inputs name no file
    system: str | None = None
    template: str | None = None
    batch_size: int = Field(8, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    stop: str | list[str] = []
    seed: int | None = None  # None: the spec's
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class ServeArguments(InferArguments):
    """What `kind: serve` may say; each question may say otherwise how it is to be answered."""

    default_system: str | None = None  # None: the one that trained
    idle_s: float = Field(600.0, gt=0)


class DownloadArguments(BaseModel):
    """What `kind: download` may say."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    source: str
    revision: str | None = None


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
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BadSpec(f"{first['msg']}.", field=field) from None
    return arguments, sorted(said.keys() - model.model_fields.keys() - _OF_THE_JOB)
