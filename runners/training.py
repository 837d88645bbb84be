"""The training loop: small, exact, the same for every stage.

A step is the set of examples that the plain recipe would take: batch x accumulation rows in the
order of the seed. Its loss is the sum over all of them divided by the units (tokens, for sft) of
the whole step, however it is split into groups; clipping looks at the norm of all gradients.
It knows neither files nor chat templates: examples in, a trained model and events out.
"""

import logging
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from tuneyard.runners.batches import Batch, Order, collate
from tuneyard.runners.best_model import Ranking, best_folder
from tuneyard.runners.checkpoint import (
    Position,
    Running,
    random_state,
    write_checkpoint,
)
from tuneyard.runners.events import EventLog
from tuneyard.runners.examples import Item
from tuneyard.runners.failures import LossNotFinite, Stopped
from tuneyard.runners.generation import undisturbed
from tuneyard.runners.learned import restore_learned
from tuneyard.runners.losses import Objective, Outcome, summary
from tuneyard.runners.measuring import measure
from tuneyard.runners.packing import filled_groups
from tuneyard.runners.retention import RESUME_POINT_S, drop_old
from tuneyard.runners.schedules import Schedule
from tuneyard.runners.stops import Stops
from tuneyard.store.folder import verify_folder

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Plan:
    """How long a run is, and when it measures, saves and logs. Steps; None: never."""

    steps: int
    steps_per_epoch: int
    rows_per_batch: int
    rows_per_step: int
    eval_rows_per_batch: int
    max_grad_norm: float
    eval_every: int | None
    save_every: int | None
    log_every: int
    keep: int | None

    def epoch(self, consumed: int, count: int) -> float:
        """How many epochs of ``count`` examples so many are, by whole batches as transformers."""
        batch = min(self.rows_per_batch, self.rows_per_step)
        whole, rest = divmod(consumed, count)
        return whole + math.ceil(rest / batch) / math.ceil(count / batch)

    def eval_due(self, step: int) -> bool:
        """Before the first step, after the last, and as often as was asked in between."""
        return self.eval_every is not None and (
            step in (0, self.steps) or step % self.eval_every == 0
        )

    def save_due(self, step: int) -> bool:
        """As often as was asked."""
        return step > 0 and _divides(self.save_every, step)

    def watch_due(self, step: int) -> bool:
        """Before the first step, at checkpoints that were asked for, and after the last."""
        return step in (0, self.steps) or self.save_due(step)


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@dataclass(frozen=True)
class Data:
    """Items to learn from, in what order, and items to measure on."""

    examples: Sequence[Item]
    order: Order
    held_out: Sequence[Item]
    pad_id: int


class Draw(Protocol):
    """Makes what is learned of what a step asks; see runners/rollouts.py."""

    def __call__(
        self,
        model: Any,
        items: Sequence[Item],
        /,
        *,
        before: int,
        purpose: str,
        give_way: Callable[[], None],
    ) -> tuple[Sequence[Item], dict[str, float]]:
        """What is to be learned, and measures of it. before: how many items were asked so far."""


@dataclass(frozen=True)
class Step:
    """What a step did. ``seconds`` are wall time; ``tokens`` include those that are no target."""

    loss: float
    measures: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float


class Interrupted(Exception):
    """SIGTERM came between two batches, or two tokens."""


@dataclass
class Trainer:
    """One run, from wherever ``at`` is to its end.

    run: what a resumed run must agree with, and what it runs on; base_id: what files call the base;
    ranking: which evaluation is the best; resumed: the checkpoint that the run began from;
    shared: the model keeps sequences apart that stand in one row; watch: given a step, what the
    model says then; keeps_last: the last step is saved before the model of a better one is taken.
    """

    running: Running
    data: Data
    plan: Plan
    objective: Objective
    schedule: Schedule
    at: Position
    events: EventLog
    stops: Stops
    workdir: Path
    run: Mapping[str, Any]
    base_id: str
    ranking: Ranking
    resumed: Path | None = None
    draw: Draw | None = None
    watch: Callable[[int], list[dict[str, Any]]] | None = None
    shared: bool = False
    keeps_last: bool = False

    def __post_init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=20)
        self.saved_step = self.at.step  # at 0: nothing to save yet
        self.saved_at = time.monotonic()
        self._remember()
        self.loaded_step: int | None = None  # whose model was taken at the end, if not the last

    @property
    def epoch(self) -> float:
        """How often the examples were seen, all in all."""
        return self.plan.epoch(self.at.examples, len(self.data.examples))

    def train(self) -> None:
        """Take all steps that are left.

        Raises: LossNotFinite; Stopped, after a checkpoint if there is anything to keep.
        """
        self.running.model.train()
        self.interruptible(self._run)
        self._end()

    def interruptible(self, work: Callable[[], Answer]) -> Answer:
        """Work that gives way. Raises: Stopped, after a checkpoint if there is anything to keep."""
        self.stops.defer()
        try:
            return work()
        except Interrupted:
            self.save()
            raise Stopped(at_checkpoint=self.at.step > 0) from None

    def _run(self) -> None:
        while True:
            self.report_progress()
            if self.data.held_out and self._eval_due():
                self._evaluate()
            saving = self._save_due()
            if self.watch is not None and self._watch_due(saving=saving):
                with self.running.mover.at_rest():
                    self._answer(self.watch)
            if saving:
                self.save()
            if self.at.step >= self.plan.steps or self.ranking.is_over(self.at):
                return
            self._finish(self._step())

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations ended the run before its plan did."""
        return self.at.step < self.plan.steps and self.ranking.is_over(self.at)

    def _end(self) -> None:
        """Leave the model that is to be kept, and say why it is not the last step's."""
        self.running.mover.settle()
        done = self.at.step
        if self.stopped_early:
            self.events.emit("progress", done=done, total=done, unit="steps", eta_s=0.0)
            said = f"Ended at step {done} of {self.plan.steps}: {self.at.bad_evaluations}"
            said += f" evaluations in a row were no better than that of step {self.at.best_step}."
            self.events.warn("stopped_early", said)
        if not self.ranking.load or self.at.best_step in (None, done):
            return
        folder = best_folder(self.at, self.workdir, self.resumed)
        if folder is None:
            raise FileNotFoundError(f"The checkpoint of step {self.at.best_step} is gone.")
        if self.keeps_last:
            self.save()
        verify_folder(folder)
        restore_learned(self.running.model, folder)
        self.loaded_step = self.at.best_step
        log.info("took the model of step %d", self.loaded_step)

    def _step(self) -> Step:
        """One optimizer step. Raises: Interrupted, while checkpoints still hold the step before."""
        began = time.monotonic()
        rows = self.data.order.take(self.at.examples, self.plan.rows_per_step)
        examples, drawn = self._items([self.data.examples[i] for i in rows])
        units = max(1, sum(map(self.objective.units, examples)))
        learning_rate = self.schedule.at(self.at.step)
        self.running.mover.set_rate(learning_rate)
        parts, tokens = [], 0
        for group in self._groups(examples):
            self.give_way()
            batch = collate(group, self.data.pad_id, shared=self.shared)
            parts.append(self._backward(batch, units))
            tokens += batch.tokens
        loss, measures = summary(parts)  # the GPU is waited for here, once a step
        grad_norm = self._update(loss)
        self.at.examples += len(rows)
        return Step(
            loss, drawn | measures, grad_norm, learning_rate, tokens, time.monotonic() - began
        )

    def _items(self, items: Sequence[Item]) -> tuple[Sequence[Item], dict[str, float]]:
        """What a step learns of its rows."""
        if self.draw is None:
            return items, {}
        return self._drawn(items, before=self.at.examples, purpose="answers")

    def _drawn(
        self, items: Sequence[Item], *, before: int, purpose: str
    ) -> tuple[Sequence[Item], dict[str, float]]:
        assert self.draw is not None  # noqa: S101 - the caller looked
        model, give_way = self.running.model, self.give_way
        return self.draw(model, items, before=before, purpose=purpose, give_way=give_way)

    def _groups(self, examples: Sequence[Item]) -> Sequence[Sequence[Item]]:
        """A step's items as they go through the model; rows that need no padding go as they fit."""
        size = self.plan.rows_per_batch
        if self.shared and not self.objective.grouped:
            return filled_groups(examples, size)
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def _backward(self, batch: Batch, units: int) -> Outcome:
        """Add a group's share to the gradients; returns its share of the step's loss."""
        device = self.running.device
        batch = batch.to(device)
        with self.running.casting():
            outcome = self.objective.loss(self.running.model, batch)
        loss = outcome.loss / units
        self.running.scaler.scale(loss).backward()
        return Outcome(loss.detach(), outcome.measures)

    def _update(self, loss: float) -> float:
        """Clip, move the parameters, forget the gradients; returns the norm before clipping."""
        mover, scaler = self.running.mover, self.running.scaler
        mover.unscale(scaler)
        if (allocation := self.running.allocation) is not None:
            allocation.add_penalty()
        grad_norm = mover.clip(self.plan.max_grad_norm or math.inf)
        if not scaler.is_enabled():
            self._check_finite(loss, grad_norm)
        overflowed = not math.isfinite(grad_norm)
        self.at.skipped_steps += overflowed  # the scaler leaves the parameters alone, scales less
        mover.step(scaler, norm=grad_norm)
        if allocation is not None:
            allocation.after_step(self.at.step + 1, overflowed=overflowed)
        mover.forget()
        return grad_norm

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        raise LossNotFinite(
            f"Step {self.at.step + 1}: loss {loss}, gradient norm {grad_norm}.",
            hint="a lower learning_rate or a warm-up often helps; look at the rows of this step",
        )

    def _remember(self) -> None:
        """What a checkpoint of this step holds, and the groups of the next one will change."""
        self.random, self.baseline = random_state(self.running.device), replace(self.at.baseline)

    def _finish(self, step: Step) -> None:
        """Count a step, and say what it did."""
        before = self.at.loss_sum / max(1, self.at.step)
        self.at.loss_sum += step.loss if math.isfinite(step.loss) else before  # as transformers
        self.at.step += 1
        self.at.tokens += step.tokens
        self._remember()
        self.durations.append(step.seconds)
        values = {
            "loss": step.loss,
            "lr": step.learning_rate,
            "grad_norm": step.grad_norm,
            "epoch": self.epoch,
            "tokens": self.at.tokens,
            "tokens_per_s": step.tokens / step.seconds,
        }
        values |= step.measures
        self.events.metric(self.at.step, **values, **memory(self.running.device))
        self.at.window.take({"loss": step.loss, **step.measures})
        if _divides(self.plan.log_every, self.at.step) or self.at.step == self.plan.steps:
            means = self.at.window.means()
            shown = {"loss": means.pop("loss"), "lr": step.learning_rate}
            self._log(**shown, grad_norm=step.grad_norm, **means)

    def _log(self, **values: float) -> None:
        """A line of trainer_log.jsonl. No times: the same run writes the same file.

        What is not finite has no place in JSON.
        """
        done, total = self.at.step, self.plan.steps
        line: dict[str, float] = {
            "current_steps": done,
            "total_steps": total,
            "percentage": round(100 * done / total, 2),
            "total_tokens": self.at.tokens,
        }
        line |= {"epoch": round(self.epoch, 4)}
        line |= {name: value for name, value in values.items() if math.isfinite(value)}
        self.at.log.append(line)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("step %d/%d  %s", done, total, shown)

    def _eval_due(self) -> bool:
        return self.at.evaluated_step < self.at.step and self.plan.eval_due(self.at.step)

    def _evaluate(self) -> None:
        with self.running.mover.at_rest():
            loss, measures = self._measure()
        self.at.evaluated_step, self.at.eval_loss = self.at.step, loss
        found = {"eval_loss": loss} | {f"eval_{name}": value for name, value in measures.items()}
        self.events.metric(self.at.step, **found)
        self._log(**found)
        value = self.at.eval_metric = self.ranking.value(found)
        if self.at.step:  # the base itself is no candidate, as in transformers
            self.ranking.take(self.at, value)
            self.schedule.measured(value)
            self.at.schedule = self.schedule.state()

    def _measure(self) -> tuple[float, dict[str, float]]:
        """The loss over all units of the held-out rows together, and the measures beside it.

        Of answers that are drawn, what counts is their reward: the loss is minus that.
        """
        if self.draw is not None:
            _, found = self._drawn(self.data.held_out, before=0, purpose="evaluation")
            return -found["reward"], found
        model = self.running.model
        model.eval()
        losses = measure(
            model,
            self.data.held_out,
            self.objective,
            rows=self.plan.eval_rows_per_batch,
            pad_id=self.data.pad_id,
            device=self.running.device,
            before_each=lambda _: self.give_way(),
            casting=self.running.casting,
            shared=self.shared,
        )
        model.train()
        return losses

    def _watch_due(self, *, saving: bool) -> bool:
        due = saving or self.plan.watch_due(self.at.step)
        return due and self.at.watched_step < self.at.step

    def _answer(self, watch: Callable[[int], list[dict[str, Any]]]) -> None:
        """Before the checkpoint of this step, which holds the answers then: nothing comes twice.

        Those at a resume point, which comes when it comes, are told and not kept: the same run
        leaves the same file.
        """
        running = self.running
        with undisturbed(running.model, running.device, running.casting()):
            lines = watch(self.at.step)
        for line in lines:
            self.events.emit("sample", **line)
        self.at.watched_step = self.at.step
        if self.plan.watch_due(self.at.step):
            self.at.answers += lines

    def _save_due(self) -> bool:
        asked = self.stops.take_checkpoint_asked()
        old = time.monotonic() - self.saved_at > RESUME_POINT_S
        due = self.plan.save_due(self.at.step) or self.ranking.wants_kept(self.at)
        return asked or old or due

    def save(self) -> None:
        """Write a checkpoint of the last whole step, unless it is there already."""
        if self.at.step == self.saved_step:
            return
        with self.running.mover.at_rest():
            path, digest = write_checkpoint(
                self.workdir,
                self.running,
                position=replace(self.at, baseline=self.baseline),
                random=self.random,
                run=self.run,
                base_id=self.base_id,
                greater=self.ranking.greater,
            )
        self.saved_step, self.saved_at = self.at.step, time.monotonic()
        self.events.emit("checkpoint", step=self.at.step, path=path, manifest_sha256=digest)
        best = self.at.best_step
        drop_old(self.workdir, newest=self.at.step, best=best, limit=self.plan.keep)

    def report_progress(self) -> None:
        """Say how many steps are done."""
        left, mean = self.plan.steps - self.at.step, 0.0
        if self.durations:
            mean = sum(self.durations) / len(self.durations)
        eta_s = round(left * mean, 1) if self.durations else None
        done, total = self.at.step, self.plan.steps
        self.events.emit("progress", done=done, total=total, unit="steps", eta_s=eta_s)

    def give_way(self) -> None:
        """Between two pieces of work. Raises: Interrupted when the runner was asked to stop."""
        if self.stops.stop_asked:
            raise Interrupted


def memory(device: str) -> dict[str, int]:
    """Bytes in use: of the GPU, the most that was reserved; else this process's resident set."""
    if device == "cuda":
        return {"gpu_bytes": torch.cuda.max_memory_reserved()}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss_bytes": pages * resource.getpagesize()}
