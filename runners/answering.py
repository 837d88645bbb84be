"""Putting grpo and rloo together: the questions that can be asked, who judges, how is drawn."""

from collections.abc import Sequence
from typing import cast

import torch

from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import ends_of
from tuneyard.runners.batches import Chosen
from tuneyard.runners.chat import Chat
from tuneyard.runners.checkpoint import Running
from tuneyard.runners.examples import Item, Question
from tuneyard.runners.failures import BadData
from tuneyard.runners.judges import functions_of, load_scorer
from tuneyard.runners.reference import Reference
from tuneyard.runners.rewards import check_columns
from tuneyard.runners.rollouts import Comparing, Drawing, Judge, Rollouts


def answerable(questions: Sequence[Item], asked: Asked, attempt: Attempt) -> Sequence[Item]:
    """Those that leave room for an answer. Raises: BadData for a row that no reward can judge."""
    arguments, limit = asked.arguments, asked.config.get("max_position_embeddings") or 1 << 20
    rows = cast(Sequence[Question], questions)
    check_columns(
        arguments.reward_funcs or (), [q.row.columns for q in rows], [q.row.line for q in rows]
    )
    longest = limit - arguments.max_completion_length
    kept = [i for i, question in enumerate(rows) if len(question.ids) <= longest]
    if len(kept) == len(questions):
        return questions
    left = f"{limit} positions of the model, less max_completion_length"
    if not kept:
        hint = "a smaller max_completion_length leaves more to the questions"
        raise BadData(f"No question fits within the {left}.", hint=hint)
    note = f"{len(questions) - len(kept)} of {len(questions)} questions do not fit: {left}."
    attempt.events.warn("rows_skipped", note)
    return Chosen(questions, kept)


def rollouts_of(
    asked: Asked,
    attempt: Attempt,
    chat: Chat,
    running: Running,
    *,
    reference: Reference | None,
    dtype: torch.dtype,
) -> Rollouts:
    """How a run of grpo or rloo draws its answers and compares them."""
    arguments, device = asked.arguments, attempt.device.torch_name
    rows = arguments.per_device_train_batch_size
    drawing = Drawing(
        generations=arguments.generations,
        longest=arguments.max_completion_length,
        temperature=arguments.drawn_at,
        rows=rows,
        stop_ids=tuple(chat.stop_ids(ends_of(asked.model))),
        seed=asked.seed,
        device=device,
    )
    comparing = Comparing(
        stage=arguments.stage,
        scale=arguments.scale_rewards,
        normalized=arguments.normalize_advantages,
        beta=arguments.distance_weight,
        reference=reference if arguments.stage == "rloo" else None,
        skip_truncated=arguments.mask_truncated_completions,
    )
    judge = _judge(asked, attempt, dtype=dtype, rows=rows)
    return Rollouts(chat, drawing, comparing, judge, running.casting)


def _judge(asked: Asked, attempt: Attempt, *, dtype: torch.dtype, rows: int) -> Judge:
    arguments, inputs = asked.arguments, attempt.spec.inputs
    if arguments.reward_funcs:
        return functions_of(arguments.reward_funcs, arguments.reward_weights)
    base = attempt.input("reward_base") if "reward_base" in inputs else None
    return load_scorer(
        attempt.input("reward_model"),
        base,
        dtype=dtype,
        device=attempt.device.torch_name,
        rows=rows,
    )
