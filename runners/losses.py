"""What a step minimises. A stage is one objective; the loop is the same for all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import cross_entropy

from tuneyard.runners.batches import Batch
from tuneyard.runners.examples import IGNORED, Item


class Measure(NamedTuple):
    """Something to look at beside the loss: a sum, and over how many it is one."""

    total: torch.Tensor
    over: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """loss: the *sum* over a group of items, of as many terms as they have units."""

    loss: torch.Tensor
    measures: Mapping[str, Measure] = field(default_factory=dict)


@dataclass
class RunningMean:
    """The mean of all rewards that were seen while training: bco's baseline."""

    total: float = 0.0
    count: int = 0

    def take(self, value: torch.Tensor, *, keep: bool) -> float:
        """The mean with this value in it; ``keep``: it stays in."""
        total, count = self.total + float(value), self.count + 1
        if keep:
            self.total, self.count = total, count
        return total / count


class Objective(Protocol):
    """The loop divides by the units of the whole step, however it was split into groups."""

    @property
    def grouped(self) -> bool:
        """Whether it counts which items of a step stand in one group."""

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The loss of a group of items, with its graph."""

    def units(self, item: Item) -> int:
        """How many terms of the sum an item brings."""


def means(outcomes: Iterable[Outcome]) -> dict[str, torch.Tensor]:
    """Each measure over all groups together; one that nothing counted for is left out."""
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for outcome in outcomes:
        for name, measure in outcome.measures.items():
            totals[name] = totals.get(name, 0) + measure.total.detach().double()
            counts[name] = counts.get(name, 0) + measure.over
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def summary(parts: Sequence[Outcome]) -> tuple[float, dict[str, float]]:
    """The sum of the losses of all groups, and the mean of each measure over them."""
    measures = {name: float(value) for name, value in means(parts).items()}
    if {"rewards/chosen", "rewards/rejected"} <= measures.keys():
        # Labelled answers come in no pairs, and have the distance of the means, as TRL's.
        apart = measures["rewards/chosen"] - measures["rewards/rejected"]
        measures.setdefault("rewards/margins", apart)
    return float(torch.stack([part.loss for part in parts]).sum()), measures


def token_losses(model: Any, batch: Batch, *, temperature: float = 1.0) -> torch.Tensor:
    """-log p of each target, [sequences, positions] in fp32; 0 where there is no target."""
    logits = token_logits(model, batch)
    if temperature != 1.0:
        logits = logits.float() / temperature
    return losses_of(logits, batch)


def token_logits(model: Any, batch: Batch) -> torch.Tensor:
    """[rows, positions, vocabulary], where something is a target."""
    found: torch.Tensor = batch.read_by(model, logits_to_keep=batch.positions).logits
    return found


def losses_of(logits: torch.Tensor, batch: Batch, *, smoothing: float = 0.0) -> torch.Tensor:
    """-log p of each target by its logits.

    smoothing: the share of each target that all words of the vocabulary have in equal parts.
    """
    logits, targets = logits.float().flatten(0, 1), batch.targets.flatten()
    loss = partial(cross_entropy, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    if batch.kept is None:
        flat = loss(logits, targets)
    else:
        found = loss(logits, targets[batch.kept])
        flat = found.new_zeros(len(targets)).index_copy(0, batch.kept, found)
    return flat.view_as(batch.targets)


def accuracy_of(logits: torch.Tensor, batch: Batch) -> Measure:
    """Which share of a row's targets were the likeliest tokens: each row counts the same.

    Source: behaviour of LLaMA-Factory 0.9.5, ComputeAccuracy in train/sft/metric.py.
    """
    wanted = batch.targets != IGNORED
    likeliest = logits.argmax(-1).flatten()
    if batch.kept is not None:
        everywhere = torch.full_like(batch.targets.flatten(), IGNORED)
        likeliest = everywhere.index_copy(0, batch.kept, likeliest)
    hits = (likeliest.view_as(batch.targets) == batch.targets) & wanted
    counts = wanted.sum(1)
    shares = hits.sum(1).double() / counts.clamp(min=1)
    return Measure(shares.sum(), (counts > 0).sum())


@dataclass(frozen=True)
class TokenLoss:
    """Stages sft and pt: the mean of -log p over all targets of a step.

    accuracy: measured beside it, where nothing is learned.
    """

    accuracy: bool = False
    smoothing: float = 0.0

    @property
    def grouped(self) -> bool:
        """Each token is for itself."""
        return False

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the targets."""
        logits = token_logits(model, batch)
        measured = self.accuracy and not model.training
        measures = {"accuracy": accuracy_of(logits.detach(), batch)} if measured else {}
        return Outcome(losses_of(logits, batch, smoothing=self.smoothing).sum(), measures)

    def units(self, item: Item) -> int:
        """Its targets."""
        return item.targets
