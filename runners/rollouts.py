"""Answers that the model draws while it learns, what they are worth, and what follows from that.

Which token is drawn depends on the seed, on how many questions came before, and on the model: not
on how answers are grouped, nor on where a run was interrupted.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tuneyard.runners.batches import collate
from tuneyard.runners.chat import Chat
from tuneyard.runners.examples import IGNORED, Drawn, Example, Item, Question
from tuneyard.runners.generation import configure, left_padded, undisturbed
from tuneyard.runners.losses import token_losses
from tuneyard.runners.online import grpo_advantages, rloo_advantages
from tuneyard.runners.reference import Reference
from tuneyard.runners.rewards import Answered
from tuneyard.runners.seeds import stream_seed


class Judge(Protocol):
    """Says what answers are worth."""

    @property
    def names(self) -> Sequence[str]:
        """What its parts are called."""

    @property
    def weights(self) -> Sequence[float]:
        """How much each part counts."""

    def scores(
        self,
        questions: Sequence[Question],
        answers: Sequence[Answered],
        give_way: Callable[[], None],
    ) -> Sequence[Sequence[float]]:
        """For each answer what each part of the judge makes of it."""


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. rows: how many at a time."""

    generations: int
    longest: int
    temperature: float
    rows: int
    stop_ids: tuple[int, ...]
    seed: int
    device: str


@dataclass(frozen=True)
class Comparing:
    """What rewards become. reference: what ``beta`` draws rloo's answers back to."""

    stage: str
    scale: str = "group"
    normalized: bool = False
    beta: float = 0.0
    reference: Reference | None = None
    skip_truncated: bool = False


@dataclass(frozen=True)
class Rollouts:
    """Questions become answers with advantages. casting: how the loop computes."""

    chat: Chat
    drawing: Drawing
    comparing: Comparing
    judge: Judge
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(
        self,
        model: Any,
        items: Sequence[Item],
        /,
        *,
        before: int,
        purpose: str,
        give_way: Callable[[], None],
    ) -> tuple[list[Item], dict[str, float]]:
        """Answers to each question one after the other, and what is worth saying of them all.

        before: how many questions came before; purpose: whose stream of random numbers is drawn
        from. Raises: whatever ``give_way`` raises.
        """
        each, questions = self.drawing.generations, cast(Sequence[Question], items)
        asked = [question for question in questions for _ in range(each)]
        numbers = [(before + i, n) for i in range(len(questions)) for n in range(each)]
        with torch.no_grad(), undisturbed(model, self.drawing.device, nullcontext()):
            streams = [(purpose, *number) for number in numbers]
            drawn = self._draw(model, asked, streams, give_way)
            answers = [self._read(q, ids) for q, ids in zip(asked, drawn, strict=True)]
            scores = torch.tensor(self.judge.scores(asked, answers, give_way), dtype=torch.float64)
            examples = [_example(q, ids) for q, ids in zip(asked, drawn, strict=True)]
            drift, measures = self._drift(model, examples, give_way)
        rewards = (scores * torch.tensor(self.judge.weights, dtype=torch.float64)).sum(1)
        compared = (rewards - self.comparing.beta * drift).view(-1, each)
        advantages = self._advantages(compared).flatten().tolist()
        measures |= _measures(rewards.view(-1, each), self._columns(scores))
        measures |= self._lengths(drawn)
        learned: list[Item] = [
            Drawn(self._taught(example, ids), advantage)
            for example, ids, advantage in zip(examples, drawn, advantages, strict=True)
        ]
        return learned, measures

    def _draw(
        self,
        model: Any,
        questions: Sequence[Question],
        streams: Sequence[tuple[object, ...]],
        give_way: Callable[[], None],
    ) -> list[list[int]]:
        """The tokens of each answer, with the one that ended it."""
        found: list[list[int]] = []
        for start in range(0, len(questions), self.drawing.rows):
            part = slice(start, start + self.drawing.rows)
            found += self._draw_group(model, questions[part], streams[part], give_way)
        return found

    def _draw_group(
        self,
        model: Any,
        questions: Sequence[Question],
        streams: Sequence[tuple[object, ...]],
        give_way: Callable[[], None],
    ) -> list[list[int]]:
        drawing, pad = self.drawing, self.chat.tokenizer.pad_token_id
        ids, mask = left_padded([q.ids for q in questions], pad, drawing.device)
        width = ids.shape[1]
        chances = torch.stack([self._chances(stream) for stream in streams]).to(drawing.device)
        configuration = GenerationConfig(
            do_sample=False,
            max_new_tokens=drawing.longest,
            eos_token_id=list(drawing.stop_ids),
            pad_token_id=pad,
        )
        configure(model, configuration)
        with self.casting():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList(
                    [_ByChance(chances, width, drawing.temperature)]
                ),
                stopping_criteria=StoppingCriteriaList([_GivesWay(give_way)]),
            )
        return [self._ended(row) for row in out[:, width:].tolist()]

    def _chances(self, stream: tuple[object, ...]) -> torch.Tensor:
        """A number between 0 and 1 for each token of an answer."""
        numbers = torch.Generator().manual_seed(stream_seed(self.drawing.seed, *stream))
        return torch.rand(self.drawing.longest, generator=numbers, dtype=torch.float64)

    def _ended(self, row: list[int]) -> list[int]:
        ends = self.drawing.stop_ids
        end = next((i for i, id_ in enumerate(row) if id_ in ends), len(row) - 1)
        return row[: end + 1]

    def _truncated(self, ids: Sequence[int]) -> bool:
        return ids[-1] not in self.drawing.stop_ids

    def _read(self, question: Question, ids: list[int]) -> Answered:
        said = ids if self._truncated(ids) else ids[:-1]
        text = self.chat.tokenizer.decode(said, skip_special_tokens=True)
        return Answered(str(text), len(said), question.row.columns)

    def _taught(self, example: Example, ids: Sequence[int]) -> Example:
        if self.comparing.skip_truncated and self._truncated(ids):
            return Example(example.ids, [IGNORED] * len(example.ids))
        return example

    def _drift(
        self, model: Any, examples: Sequence[Example], give_way: Callable[[], None]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """How much likelier each answer is than to the reference, of which rloo takes account."""
        reference, drawing = self.comparing.reference, self.drawing
        if reference is None:
            return torch.zeros(len(examples), dtype=torch.float64), {}
        found, tokens = [], 0
        for start in range(0, len(examples), drawing.rows):
            give_way()
            part = examples[start : start + drawing.rows]
            batch = collate(part, self.chat.tokenizer.pad_token_id).to(drawing.device)
            with self.casting():
                own = -token_losses(model, batch, temperature=drawing.temperature)
                old = reference.logps(model, batch, temperature=drawing.temperature)
            found.append((own - old).sum(1).double().cpu())
            tokens += sum(example.targets for example in part)
        drift = torch.cat(found)
        return drift, {"kl": float(drift.sum()) / tokens}

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        if self.comparing.stage == "rloo":
            return rloo_advantages(rewards, normalized=self.comparing.normalized)
        return grpo_advantages(rewards, scale=self.comparing.scale)

    def _columns(self, scores: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return dict(zip(self.judge.names, scores.T, strict=True))

    def _lengths(self, drawn: Sequence[Sequence[int]]) -> dict[str, float]:
        lengths = list(map(len, drawn))
        return {
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": sum(map(self._truncated, drawn)) / len(drawn),
        }


def _example(question: Question, ids: list[int]) -> Example:
    return Example([*question.ids, *ids], [IGNORED] * len(question.ids) + ids)


def _measures(rewards: torch.Tensor, scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Rewards as TRL names them; rewards: [prompts, answers], scores: [answers] of each part."""
    found = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "frac_reward_zero_std": float((rewards.std(1) < 1e-8).double().mean()),
    }
    for name, values in scores.items():
        found[f"rewards/{name}/mean"] = float(values.mean())
        found[f"rewards/{name}/std"] = float(values.std())
    return found


class _ByChance(LogitsProcessor):
    """Leaves of each row's tokens the one that its chance falls on.

    chances: [rows, tokens], from 0 to below 1; width: of the questions.
    """

    def __init__(self, chances: torch.Tensor, width: int, temperature: float) -> None:
        self.chances, self.width, self.temperature = chances, width, temperature

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = ids.shape[1] - self.width
        upto = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        wanted = self.chances[:, at : at + 1] * upto[:, -1:]
        chosen = torch.searchsorted(upto, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _GivesWay(StoppingCriteria):
    """Looks at every token whether the runner was asked to stop."""

    def __init__(self, give_way: Callable[[], None]) -> None:
        self.give_way = give_way

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.give_way()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
