"""What is measured, logged and saved while a base is tuned, and when."""

from typing import Literal

from pydantic import Field

from tuneyard.specs.fields import Spec
from tuneyard.specs.numbers import CountOrShare, Positive, StepsOrShare

Strategy = Literal["no", "steps", "epoch"]


class EvaluatingFields(Spec):
    """What a fine-tune says of its measures, its log and its checkpoints."""

    val_size: CountOrShare = Field(0.0, description="Share (below 1) or number of rows held out.")
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="The same, evaluating.")
    logging_steps: StepsOrShare = Field(1, description="Steps between lines of the log.")
    save_strategy: Strategy = Field("steps", description="When checkpoints are saved.")
    save_steps: StepsOrShare = Field(500, description="Steps between checkpoints; below 1 a share.")
    save_total_limit: Positive | None = Field(None, description="Checkpoints kept; unset: 2.")
    eval_strategy: Strategy = Field("no", description="When the held-out rows are evaluated.")
    eval_steps: StepsOrShare | None = Field(None, description="Steps between evaluations.")
