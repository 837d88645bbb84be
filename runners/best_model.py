"""Which evaluation was the best, whether to go on, and where the best model lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.checkpoint import Position
from tuneyard.runners.failures import BadSpec
from tuneyard.specs.runner import CHECKPOINTS


@dataclass(frozen=True)
class Ranking:
    """Compares evaluations. patience: so many in a row may be no better; None: any number.

    load: the result is the best model; save: it is kept as soon as it is measured.
    """

    metric: str = "loss"
    greater: bool = False
    patience: int | None = None
    load: bool = False
    save: bool = False

    @property
    def compares_by(self) -> str:
        """The metric, and which way: what was best by another is not comparable."""
        return f"-{self.metric}" if self.greater else self.metric

    def value(self, found: Mapping[str, float]) -> float:
        """What counts of an evaluation. Raises: BadSpec when it was not measured."""
        value = found.get(f"eval_{self.metric}")
        if value is None:
            measured = ", ".join(sorted(name.removeprefix("eval_") for name in found))
            message = f"The evaluation does not measure {self.metric}."
            raise BadSpec(message, field="metric_for_best_model", hint=f"it measures {measured}")
        return value

    def take(self, at: Position, value: float) -> None:
        """Count an evaluation of the model that has just learned. No number is no better."""
        best = at.best_metric
        better = value == value and (
            best is None or (value > best if self.greater else value < best)
        )
        if better:
            at.best_metric, at.best_loss, at.best_step = value, at.eval_loss, at.step
        at.bad_evaluations = 0 if better else at.bad_evaluations + 1

    def is_over(self, at: Position) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and at.bad_evaluations >= self.patience

    def wants_kept(self, at: Position) -> bool:
        """Whether the model as it is must not be lost."""
        return (self.save or self.load) and at.step > 0 and at.best_step == at.step


def forget_best(at: Position) -> None:
    """As if nothing had been measured yet."""
    at.best_step = at.best_loss = at.best_metric = None
    at.bad_evaluations = 0


def ranking_of(arguments: FinetuneArguments) -> Ranking:
    """What the arguments say of the best model."""
    return Ranking(
        metric=arguments.best_metric,
        greater=arguments.greater_is_best,
        patience=arguments.early_stopping_steps,
        load=arguments.load_best_model_at_end,
        save=arguments.save_strategy == "best",
    )


def best_folder(at: Position, workdir: Path, resumed: Path | None) -> Path | None:
    """The checkpoint of the best evaluation: of this attempt, or beside the one resumed from."""
    if at.best_step is None:
        return None
    name = f"step-{at.best_step}"
    places = [workdir / CHECKPOINTS / name] + ([resumed.parent / name] if resumed else [])
    return next((place for place in places if place.is_dir()), None)
