"""What is measured, logged and saved while a base is tuned, and when; which model is the best."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import Spec, refusal
from tuneyard.specs.numbers import CountOrShare, Positive, StepsOrShare
from tuneyard.specs.problems import problem

if TYPE_CHECKING:
    from tuneyard.specs.finetune import FinetuneSpec

Strategy = Literal["no", "steps", "epoch"]

_REWARDS = frozenset({"loss", "rewards/chosen", "rewards/rejected", "rewards/margins"})
MEASURED: Mapping[str, frozenset[str]] = {
    "sft": frozenset({"loss"}),
    "pt": frozenset({"loss"}),
    "rm": _REWARDS | {"rewards/accuracies"},
    "dpo": _REWARDS | {"rewards/accuracies", "logps/chosen", "logps/rejected", "sft_loss"},
    "kto": _REWARDS | {"logps/chosen", "logps/rejected", "kl"},
}
"""Stage -> what an evaluation of it measures; of grpo and rloo the runner knows."""


def _metric(name: str) -> str:
    """A metric's name without transformers' prefix."""
    plain = name.removeprefix("eval_")
    if not plain:
        raise refusal("bad_choice", "names no metric", "for example loss")
    return plain


class EvaluatingFields(Spec):
    """What a fine-tune says of its measures, its log and its checkpoints."""

    val_size: CountOrShare = Field(0.0, description="Share (below 1) or number of rows held out.")
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="The same, evaluating.")
    logging_steps: StepsOrShare = Field(1, description="Steps between lines of the log.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = Field(
        "steps", description="When checkpoints are saved; best: when an evaluation is the best yet."
    )
    save_steps: StepsOrShare = Field(500, description="Steps between checkpoints; below 1 a share.")
    save_total_limit: Positive | None = Field(None, description="Checkpoints kept; unset: 2.")
    eval_strategy: Strategy = Field("no", description="When the held-out rows are evaluated.")
    eval_steps: StepsOrShare | None = Field(None, description="Steps between evaluations.")
    early_stopping_steps: Positive | None = Field(
        None, description="End after so many evaluations in a row that are no better."
    )
    load_best_model_at_end: bool = Field(
        False, description="The result is the model of the best evaluation, not of the last step."
    )
    metric_for_best_model: (
        Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_metric)] | None
    ) = Field(None, description="What is compared; unset: loss.")
    greater_is_better: bool | None = Field(
        None, description="Unset: unless the metric's name ends in loss."
    )

    @property
    def best_metric(self) -> str:
        """What evaluations are compared by."""
        return self.metric_for_best_model or "loss"

    @property
    def greater_is_best(self) -> bool:
        """Whether more of it is better, as transformers guesses."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith("loss")


def best_model_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """The best model needs evaluations, and checkpoints where it is measured."""
    wishes = {
        "early_stopping_steps": spec.early_stopping_steps is not None,
        "load_best_model_at_end": spec.load_best_model_at_end,
        "save_strategy": spec.save_strategy == "best",
        "lr_scheduler_type": spec.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
    }
    for field, wished in wishes.items():
        if wished and spec.eval_strategy == "no":
            message = f"{field} = {getattr(spec, field)} goes by evaluations, and there are none."
            hint = "eval_strategy: steps or epoch, with val_size or eval_dataset"
            yield problem("conflicting_fields", message, field, hint)
    known = MEASURED.get(spec.stage, frozenset())
    if spec.stage in ("sft", "pt") and spec.compute_accuracy:
        known |= {"accuracy"}
    if known and spec.best_metric not in known:
        message = f"An evaluation of stage: {spec.stage} does not measure {spec.best_metric}."
        hint = f"one of: {', '.join(sorted(known))}"
        yield problem("bad_choice", message, "metric_for_best_model", hint)
    if spec.load_best_model_at_end and spec.eval_strategy != "no":
        yield from _matching(spec)


def _matching(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Each checkpoint that could be the best is evaluated: transformers' rule."""
    if spec.save_strategy == "best":
        return
    if spec.save_strategy != spec.eval_strategy:
        message = "load_best_model_at_end needs equal strategies: eval_strategy is "
        message += f"{spec.eval_strategy}, save_strategy is {spec.save_strategy}."
        hint = f"save_strategy: {spec.eval_strategy}, or best"
        yield problem("conflicting_fields", message, "save_strategy", hint)
        return
    save, evaluate = spec.save_steps, spec.eval_steps or spec.logging_steps
    mixed = (save < 1) != (evaluate < 1)
    if spec.eval_strategy == "steps" and (mixed or round(save * 10**6) % round(evaluate * 10**6)):
        message = f"save_steps = {save:g} is no multiple of eval_steps = {evaluate:g}, "
        message += "as load_best_model_at_end needs."
        hint = f"save_steps: {evaluate:g}, or save_strategy: best"
        yield problem("conflicting_fields", message, "save_steps", hint)
