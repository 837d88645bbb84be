"""Stages grpo and rloo: what an answer's worth means for its tokens. The loop is everybody's.

Each answer is learned once, by the model that drew it: the ratio of both models' probabilities is
1 wherever it is looked at, only its gradient counts, and there is nothing to clip.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tuneyard.runners.batches import Batch
from tuneyard.runners.examples import IGNORED, Item
from tuneyard.runners.losses import Measure, Outcome, token_losses
from tuneyard.runners.reference import Reference

NOT_ZERO = 1e-4
"""Added to a deviation before it divides, as TRL does."""


def grpo_advantages(rewards: torch.Tensor, *, scale: str) -> torch.Tensor:
    """How much better an answer is than its group; rewards: [prompts, answers].

    scale: whose deviation divides ("group", "batch"), or "none".
    Sources: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783
    ("none"); the deviation is that of a sample, as in TRL 1.16.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        return advantages / (rewards.std(1, keepdim=True) + NOT_ZERO)
    return advantages / (rewards.std() + NOT_ZERO) if scale == "batch" else advantages


def rloo_advantages(rewards: torch.Tensor, *, normalized: bool) -> torch.Tensor:
    """How much better an answer is than the others of its group; rewards: [prompts, answers].

    normalized: with mean 0 and deviation 1 over all.
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    advantages = rewards - others
    if not normalized:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + NOT_ZERO)


@dataclass(frozen=True)
class GrpoLoss:
    """Stage grpo: -advantage x ratio of each token, and ``beta`` times its distance.

    form: "grpo" takes the mean of each answer, then of the answers (Shao et al. 2024); "dapo" the
    mean over all tokens of the step (Yu et al. 2025, arXiv:2503.14476); "dr_grpo" divides by the
    longest answer that there could be (Liu et al. 2025, arXiv:2503.20783).
    The distance is Schulman's estimate k3, times the ratio, which makes its gradient that of the KL
    divergence; reference: what it is to, None without ``beta``.
    """

    form: str
    beta: float
    temperature: float
    longest: int
    reference: Reference | None

    @property
    def grouped(self) -> bool:
        """Each answer is for itself."""
        return False

    def units(self, item: Item) -> int:
        """What the step's sum is divided by."""
        return {"dapo": item.targets, "grpo": 1, "dr_grpo": self.longest}[self.form]

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the answers, or over their tokens."""
        logps = -token_losses(model, batch, temperature=self.temperature)
        learned = batch.targets != IGNORED
        ratio = torch.exp(logps - logps.detach())
        losses = -ratio * batch.advantages[:, None]
        measures = {}
        if self.reference is not None:
            further = self.reference.logps(model, batch, temperature=self.temperature) - logps
            distance = torch.exp(further) - further - 1
            losses = losses + self.beta * distance * ratio
            measures["kl"] = Measure((distance.detach() * learned).sum(), learned.sum())
        losses = losses * learned
        if self.form != "grpo":
            return Outcome(losses.sum(), measures)
        return Outcome((losses.sum(1) / learned.sum(1).clamp(min=1)).sum(), measures)


@dataclass(frozen=True)
class RlooLoss:
    """Stage rloo: -advantage x ratio of each answer as a whole; the mean over the answers."""

    temperature: float

    @property
    def grouped(self) -> bool:
        """Each answer is for itself."""
        return False

    def units(self, item: Item) -> int:
        """An answer is one."""
        return 1

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the answers."""
        logps = -token_losses(model, batch, temperature=self.temperature).sum(1)
        return Outcome(-(torch.exp(logps - logps.detach()) * batch.advantages).sum())
