"""Who says what drawn answers are worth: functions of the list, or a model that stage rm tuned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from tuneyard.runners.base_model import (
    class_name,
    load_tokenizer,
    load_weights,
    read_config,
)
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.examples import Question, encode_answers
from tuneyard.runners.failures import BadSpec, InputGone
from tuneyard.runners.origin import CONFIG_FILE, read_adapter_config, read_origin
from tuneyard.runners.preferences import scores as scores_of
from tuneyard.runners.rewards import Answered, Score, names_of, score_of
from tuneyard.runners.rows import Conversation
from tuneyard.specs.rewards import RewardFunc

VALUE_HEAD = "value_head.safetensors"
"""Where LLaMA-Factory puts the head of a reward model, beside an adapter or whole weights."""


@dataclass(frozen=True)
class Functions:
    """Reward functions with their weights."""

    names: Sequence[str]
    weights: Sequence[float]
    functions: Sequence[Score]

    def scores(
        self,
        questions: Sequence[Question],
        answers: Sequence[Answered],
        give_way: Callable[[], None],
    ) -> list[list[float]]:
        """What each function makes of each answer."""
        found = []
        for answered in answers:
            give_way()
            found.append([score(answered) for score in self.functions])
        return found


def functions_of(functions: Sequence[RewardFunc], weights: Sequence[float] | None) -> Functions:
    """The functions that a spec names; without weights each counts once."""
    scores = [score_of(each) for each in functions]
    return Functions(names_of(functions), weights or [1.0] * len(scores), scores)


@dataclass(frozen=True)
class Scorer:
    """A reward model: it reads question and answer through the template that trained it.

    rows: how many at a time; limit: tokens that it reads.
    """

    model: Any
    chat: Chat
    rows: int
    limit: int
    device: str
    names: Sequence[str] = ("reward_model",)
    weights: Sequence[float] = (1.0,)

    def scores(
        self,
        questions: Sequence[Question],
        answers: Sequence[Answered],
        give_way: Callable[[], None],
    ) -> list[list[float]]:
        """Its score of each answer."""
        asked = [
            Conversation([*row.messages, _says(answered.text)], [True], row.line, row.tools)
            for row, answered in zip((q.row for q in questions), answers, strict=True)
        ]
        examples = encode_answers(asked, self.chat, self.limit)
        found: list[list[float]] = []
        for start in range(0, len(examples), self.rows):
            give_way()
            part = examples[start : start + self.rows]
            batch = collate(part, self.chat.tokenizer.pad_token_id).to(self.device)
            found += [[float(score)] for score in scores_of(self.model, batch)]
        return found


def _says(text: str) -> Mapping[str, str]:
    return {"role": "assistant", "content": text}


def load_scorer(
    folder: Path,
    base: Path | None,
    *,
    dtype: torch.dtype,
    device: str,
    rows: int,
) -> Scorer:
    """Read a reward model: an adapter over ``base``, or a whole model. Raises: BadSpec, InputGone.

    The generators of random numbers stay as they were: what is read was drawn first.
    """
    try:
        model, weights, config = _load(folder, base, dtype=dtype, device=device)
    except (BadSpec, InputGone) as error:
        error.field = "reward_model"
        raise
    origin = read_origin(folder)
    chat = chat_of(
        load_tokenizer(weights),
        template=origin.get("template"),
        default_system=origin.get("default_system"),
    )
    limit = int(config.get("max_position_embeddings") or 1 << 20)
    return Scorer(model.requires_grad_(False).eval(), chat, rows, limit, device)


def _load(
    folder: Path, base: Path | None, *, dtype: torch.dtype, device: str
) -> tuple[Any, Path, Mapping[str, Any]]:
    """The model, and the folder and configuration of its weights."""
    head = folder / VALUE_HEAD
    scoring = not head.exists()
    adapted = (folder / CONFIG_FILE).exists()
    if adapted:
        read_adapter_config(folder, scoring=scoring)
    weights = base if adapted else folder
    if weights is None:
        raise BadSpec("The reward model is an adapter, and its base is not among the inputs.")
    config = read_config(weights, scoring=True)
    if scoring and not adapted:
        _check_head(config)
    with torch.random.fork_rng(devices=["cuda"] if device == "cuda" else []):
        model = load_weights(weights, config, dtype=dtype, device=device, scoring=scoring)
        if adapted:
            model = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    if not scoring:
        whole = model.get_base_model() if adapted else model
        whole.score = _value_head(head).to(device)
    return model, weights, config


def _check_head(config: Mapping[str, Any]) -> None:
    """A whole model that scores has a class of its own, and one label."""
    name = class_name(config, scoring=True)
    if not name.endswith("ForSequenceClassification") or len(config.get("id2label") or {}) != 1:
        raise BadSpec(
            "The reward model has no head that gives one score.",
            hint="name what a fine-tune of stage rm brought forth",
        )


def _value_head(path: Path) -> torch.nn.Linear:
    """LLaMA-Factory's head. Source: its files' names of tensors, as of 0.9.5."""
    tensors = load_file(path)
    weight, bias = (tensors[f"v_head.summary.{name}"] for name in ("weight", "bias"))
    head = torch.nn.Linear(weight.shape[1], 1, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
