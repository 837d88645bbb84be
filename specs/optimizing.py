"""How far and how fast parameters move: steps, batches, learning rate, optimizer."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from tuneyard.specs.fields import Spec
from tuneyard.specs.numbers import MOST, CountOrShare, Share

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


class OptimizingFields(Spec):
    """What a fine-tune says of its steps."""

    per_device_train_batch_size: int = Field(8, ge=1, le=4096, description="Rows at a time.")
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
