"""Objectives over judged answers: pairs of which one is better, and answers with a label."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from tuneyard.runners.batches import Batch
from tuneyard.runners.examples import IGNORED, Item
from tuneyard.runners.losses import Measure, Outcome, RunningMean, token_losses
from tuneyard.runners.reference import Reference

AVERAGED = frozenset({"ipo", "orpo", "simpo"})
"""Losses over the mean log-probability of a token, not the sum over an answer."""


@dataclass(frozen=True)
class PairLoss:
    """Stage dpo: sigmoid, hinge, ipo, orpo or simpo; the mean over pairs.

    Sources: Rafailov et al. 2023 (sigmoid), Zhao et al. 2023 (hinge), Azar et al. 2023 (ipo), Hong
    et al. 2024 (orpo), Meng et al. 2024 (simpo), Mitchell 2023 (label smoothing), Liu et al. 2024
    (ld_alpha), Jung et al. 2024 (bco). ftx: weight of the chosen answer's own loss.
    """

    form: str
    beta: float
    reference: Reference | None
    ftx: float = 0.0
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    ld_alpha: float | None = None
    bco: float = 0.0
    baseline: RunningMean = field(default_factory=RunningMean)

    @property
    def grouped(self) -> bool:
        """The baseline moves on from group to group."""
        return bool(self.bco)

    def units(self, item: Item) -> int:
        """A pair is one."""
        return 1

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the pairs."""
        targets = batch.targets != IGNORED
        before = None
        if self.reference is not None:  # first: what it computes is not kept for the gradient
            # As LLaMA-Factory: ld_alpha is the trained model's alone.
            before = self._answers(self.reference.logps(model, batch), targets, None)
        tokens = -token_losses(model, batch)
        chosen, rejected = self._answers(tokens, targets, self.ld_alpha).chunk(2)
        sft = -(tokens.sum(1) / targets.sum(1)).chunk(2)[0]
        if before is None:
            losses = self._alone(chosen, rejected)
            old = torch.zeros_like(chosen), torch.zeros_like(rejected)
        else:
            old = before.chunk(2)[0], before.chunk(2)[1]
            losses = self._compared((chosen - rejected) - (old[0] - old[1]))
        good, bad = self.beta * (chosen - old[0]), self.beta * (rejected - old[1])
        if self.bco:
            losses = losses + self.bco * self._against_baseline(good, bad, keep=model.training)
        measures = {
            "rewards/chosen": mean_of(good),
            "rewards/rejected": mean_of(bad),
            "rewards/accuracies": mean_of((good > bad).float()),
            "rewards/margins": mean_of(good - bad),
            "logps/chosen": mean_of(chosen),
            "logps/rejected": mean_of(rejected),
            "sft_loss": mean_of(sft),
        }
        return Outcome((losses + self.ftx * sft).sum(), measures)

    def _answers(
        self, tokens: torch.Tensor, targets: torch.Tensor, ld_alpha: float | None
    ) -> torch.Tensor:
        """log p of each answer; what the longer one has more counts ``ld_alpha`` times."""
        lengths = targets.sum(1)
        if self.form in AVERAGED:
            return tokens.sum(1) / lengths
        if ld_alpha is None:
            return tokens.sum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        beyond = targets.cumsum(1) > shared[:, None]
        return torch.where(beyond, ld_alpha * tokens, tokens).sum(1)

    def _compared(self, gained: torch.Tensor) -> torch.Tensor:
        """Losses by how much more the chosen answer gained over the reference."""
        if self.form == "hinge":
            return torch.relu(1 - self.beta * gained)
        if self.form == "ipo":
            return (gained - 1 / (2 * self.beta)) ** 2
        smooth = self.label_smoothing
        right, wrong = logsigmoid(self.beta * gained), logsigmoid(-self.beta * gained)
        return -(1 - smooth) * right - smooth * wrong

    def _alone(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Losses that need no reference, of mean log-probabilities."""
        if self.form == "simpo":
            return -logsigmoid(self.beta * (chosen - rejected) - self.simpo_gamma)
        odds = _log_odds(chosen) - _log_odds(rejected)
        return -chosen - self.beta * logsigmoid(odds)

    def _against_baseline(
        self, good: torch.Tensor, bad: torch.Tensor, *, keep: bool
    ) -> torch.Tensor:
        mean = self.baseline.take(torch.cat([good, bad]).mean().detach(), keep=keep)
        return -logsigmoid(good - mean) - logsigmoid(mean - bad)


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    return logp - torch.log1p(-torch.exp(logp))


@dataclass(frozen=True)
class LabelLoss:
    """Stage kto (Ethayarajh et al. 2024): the mean over rows, 1 - sigmoid of the reward's distance.

    The distance is to an estimate of the KL divergence from the reference, made of the mismatched
    answers of the group: which rows stand in one group therefore counts. ftx: weight of the wanted
    answers' own loss, as LLaMA-Factory 0.9.5 adds it (train/kto/trainer.py).
    """

    beta: float
    reference: Reference
    wanted_weight: float = 1.0
    unwanted_weight: float = 1.0
    ftx: float = 0.0

    @property
    def grouped(self) -> bool:
        """The divergence is a group's."""
        return True

    def units(self, item: Item) -> int:
        """A row is one."""
        return 1

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the rows."""
        own, other = batch.halves()
        with torch.no_grad():
            drift = -token_losses(model, other) - self.reference.logps(model, other)
            divergence = drift.sum(1).mean().clamp(min=0)
        before = self.reference.logps(model, own).sum(1)
        tokens, wanted = -token_losses(model, own), batch.wanted
        logps = tokens.sum(1)
        rewards = self.beta * (logps - before)
        distance = torch.where(wanted, 1.0, -1.0) * (rewards - self.beta * divergence)
        weights = torch.where(wanted, self.wanted_weight, self.unwanted_weight)
        sft = -tokens.sum(1) / (own.targets != IGNORED).sum(1)
        # LLaMA-Factory adds the wanted rows' mean to the group's, times all rows over wanted ones.
        share = wanted.sum().clamp(min=1) / len(wanted)
        losses = weights * (1 - torch.sigmoid(distance)) + self.ftx * sft * wanted / share**2
        measures = {
            "rewards/chosen": mean_of(rewards, wanted),
            "rewards/rejected": mean_of(rewards, ~wanted),
            "logps/chosen": mean_of(logps, wanted),
            "logps/rejected": mean_of(logps, ~wanted),
            "kl": mean_of(divergence.expand_as(rewards)),
        }
        return Outcome(losses.sum(), measures)


@dataclass(frozen=True)
class RewardLoss:
    """Stage rm: -log sigmoid of how much better the chosen answer scores; the mean over pairs."""

    @property
    def grouped(self) -> bool:
        """Each pair is for itself."""
        return False

    def units(self, item: Item) -> int:
        """A pair is one."""
        return 1

    def loss(self, model: Any, batch: Batch) -> Outcome:
        """The sum over the pairs."""
        chosen, rejected = scores(model, batch).chunk(2)
        measures = {
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
            "rewards/accuracies": mean_of((chosen > rejected).float()),
            "rewards/margins": mean_of(chosen - rejected),
        }
        return Outcome(-logsigmoid(chosen - rejected).sum(), measures)


def scores(model: Any, batch: Batch) -> torch.Tensor:
    """What a reward model makes of each sequence, [sequences] in fp32: its head at the last token.

    transformers' own head looks for the last token that is not padding, which is another one where
    the padding's id also ends an answer.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(whole, whole.base_model_prefix)
    last = batch.read_by(body).last_hidden_state.flatten(0, 1)[batch.ends]
    head = next(whole.score.parameters())
    return whole.score(last.to(head.dtype)).float().squeeze(-1)  # type: ignore[no-any-return]


def mean_of(values: torch.Tensor, chosen: torch.Tensor | None = None) -> Measure:
    """A measure of one value an item, or of the chosen ones."""
    values = values.detach()
    if chosen is None:
        chosen = torch.ones_like(values, dtype=torch.bool)
    return Measure((values * chosen).sum(), chosen.sum())
