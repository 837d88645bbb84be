"""Which evaluation was the best, whether to go on, and where the best model lies."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.checkpoint import Position
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.losses import Objective
from tuneyard.specs.rewards import ONLINE
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


def measure_of(
    ranking: Ranking, objective: Objective, asked: Asked, attempt: Attempt, held_out: str
) -> str:
    """What evaluations must have in common to be compared: metric, loss, rows, who judges.

    held_out: a digest of the rows.
    """
    # Of an objective the plain values alone: the rest is models, and what it remembers of a run.
    values = ((each.name, getattr(objective, each.name)) for each in fields(cast(Any, objective)))
    numbers = {name: value for name, value in values if type(value) in (int, float, str)}
    reference = getattr(objective, "reference", None)
    judges = [attempt.spec.input_ids.get("reward_model"), reference and reference.said]
    arguments = asked.arguments
    if arguments.stage in ONLINE:
        judges += [repr(arguments.reward_funcs), repr(arguments.reward_weights)]
    said = json.dumps([numbers, judges, held_out], sort_keys=True)
    return f"{ranking.compares_by} {hashlib.sha256(said.encode()).hexdigest()[:16]}"


def look_for_best(
    at: Position, ranking: Ranking, attempt: Attempt, resumed: Path | None, *, measure: str
) -> None:
    """The best so far is one by the same measure, and its checkpoint is at hand if it is needed.

    By another measure the step at hand has not been evaluated yet.
    """
    if at.compared_by != measure:
        if at.best_step is not None:
            said = f"Evaluations measure something else now: that of step {at.best_step}, the best"
            attempt.events.warn("best_by_another_measure", f"{said} so far, no longer counts.")
        forget_best(at)
        at.evaluated_step, at.eval_loss, at.eval_metric = -1, None, None
    at.compared_by = measure
    if ranking.load and at.best_step and best_folder(at, attempt.workdir, resumed) is None:
        said = f"The checkpoint of step {at.best_step}, the best so far, is gone; the best of those"
        attempt.events.warn("best_gone", f"{said} that follow is taken.")
        forget_best(at)


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
