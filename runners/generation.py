"""Generating: which settings apply, and batches of prompts as batches of texts."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tuneyard.runners.arguments import InferArguments
from tuneyard.runners.chat import Chat
from tuneyard.runners.deltas import first_stop
from tuneyard.runners.failures import BadData
from tuneyard.runners.seeds import stream_seed


@dataclass(frozen=True)
class Settings:
    """What applies; temperature 0 is greedy, max_new_tokens None as long as the model can."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    seed: int

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < NEARLY_GREEDY


NEARLY_GREEDY = 1e-6
"""Below, dividing by the temperature would leave the range of numbers."""

OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def choose_settings(
    asked: InferArguments,
    model_says: Mapping[str, Any],
    *,
    stop_ids: Sequence[int],
    seed: int,
) -> Settings:
    """The request first, then the model's generation_config, then OpenAI's defaults."""
    chosen = {
        name: _first(getattr(asked, name), model_says.get(name), default)
        for name, default in OPENAI_DEFAULTS.items()
    }
    samples = asked.do_sample
    if samples is None and asked.temperature is None:
        samples = model_says.get("do_sample")
    if samples is False:
        chosen["temperature"] = 0.0
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Settings(
        **chosen,
        max_new_tokens=_first(asked.max_new_tokens, model_says.get("max_new_tokens")),
        stop=tuple(s for s in stop if s),
        stop_ids=tuple(stop_ids),
        seed=seed,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True)
class Answer:
    """What the model said, without the end of its turn."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@contextmanager
def undisturbed(model: Any, device: str, casting: AbstractContextManager[Any]) -> Iterator[None]:
    """Let a model that learns speak: its dropout, its settings and all random streams stay.

    casting: how it computes while it learns.
    """
    learning = [module for module in model.modules() if module.training]
    before = [(each, vars(each).get("generation_config")) for each in model.modules()]
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(devices), casting:
            model.eval()
            yield
    finally:
        for module in learning:
            module.training = True
        for module, settings in before:
            if settings is not None:
                module.generation_config = settings
            else:
                vars(module).pop("generation_config", None)


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], padded at the left: answers begin in one column."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def configure(model: Any, configuration: GenerationConfig) -> None:
    """Given as the whole configuration: generate() would mix in the model's own otherwise."""
    model.generation_config = configuration
    if hasattr(model, "get_base_model"):  # peft hands it on to the wrong module
        model.get_base_model().generation_config = configuration


@dataclass(frozen=True)
class Speaker:
    """A loaded model and how it is to speak.

    ``give_way`` is called at every token; so is ``heard``, with the first row's tokens so far.
    """

    model: Any
    chat: Chat
    settings: Settings
    give_way: Callable[[], None]
    heard: Callable[[Sequence[int]], None] | None = None

    def answer(self, prompts: Sequence[Sequence[int]], *, batch: int) -> list[Answer]:
        """Answer a batch of encoded prompts. What is drawn depends on the seed and ``batch``."""
        if self._stands_before and len({len(prompt) for prompt in prompts}) > 1:
            # Padding would come between the learned vectors and the text.
            return [answer for each in prompts for answer in self.answer([each], batch=batch)]
        room = self._room(max(map(len, prompts)))
        ids, mask = left_padded(prompts, self.chat.tokenizer.pad_token_id, self.model.device)
        torch.manual_seed(stream_seed(self.settings.seed, "sampling", batch))
        configure(self.model, self._configuration(room))
        # Not inference_mode: a model that learns may keep something that it made meanwhile.
        with torch.no_grad(), warnings.catch_warnings():
            # Without padding they are counted as they would be given.
            warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList([_Stops(self, ids.shape[1])]),
            )
        rows = out[:, ids.shape[1] :].tolist()
        return [self._read(row, len(p)) for row, p in zip(rows, prompts, strict=True)]

    @property
    def _stands_before(self) -> bool:
        """Whether an adapter of learned vectors stands before the text."""
        config = getattr(self.model, "active_peft_config", None)
        return bool(getattr(config, "is_prompt_learning", False))

    @property
    def limit(self) -> int:
        """Tokens that the model reads, its own included."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 20)

    def text_of(self, row: Sequence[int]) -> str:
        """The text of an answer's tokens, to the end of the turn."""
        end = next((i for i, id_ in enumerate(row) if id_ in self.settings.stop_ids), len(row))
        return str(self.chat.tokenizer.decode(row[:end], skip_special_tokens=True))

    def _room(self, longest: int) -> int:
        limit = self.limit
        if longest >= limit:
            raise BadData(f"A prompt has {longest} tokens; the model reads {limit - 1}.")
        return min(self.settings.max_new_tokens or limit, limit - longest)

    def _configuration(self, room: int) -> GenerationConfig:
        settings = self.settings
        drawn = (
            {}
            if settings.greedy
            else {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
        )
        return GenerationConfig(
            do_sample=not settings.greedy,
            repetition_penalty=settings.repetition_penalty,
            max_new_tokens=room,
            eos_token_id=list(settings.stop_ids) or None,
            pad_token_id=self.chat.tokenizer.pad_token_id,
            **drawn,
        )

    def _read(self, row: Sequence[int], prompt_tokens: int) -> Answer:
        end = next((i for i, id_ in enumerate(row) if id_ in self.settings.stop_ids), None)
        said = row if end is None else row[:end]
        text = self.text_of(row)
        stopped = end is not None
        cut = first_stop(text, self.settings.stop)
        if cut is not None:
            text, stopped = text[:cut], True
        used = len(said) + (end is not None)
        return Answer(text, "stop" if stopped else "length", prompt_tokens, used)


class _Stops(StoppingCriteria):
    """Ends a row at a stop string, and the whole batch when the runner was asked to stop."""

    def __init__(self, speaker: Speaker, prompt_width: int) -> None:
        self.speaker, self.prompt_width = speaker, prompt_width

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.speaker.give_way()
        if self.speaker.heard is not None:
            self.speaker.heard(ids[0, self.prompt_width :].tolist())
        return torch.tensor([self._said(row) for row in ids], device=ids.device)

    def _said(self, row: torch.Tensor) -> bool:
        stops = self.speaker.settings.stop
        if not stops:
            return False
        # A token is at least one byte: so many of them hold any stop string that just ended.
        tail = row[self.prompt_width :][-max(len(s.encode()) for s in stops) - 4 :]
        text = self.speaker.chat.tokenizer.decode(tail, skip_special_tokens=True)
        return first_stop(text, stops) is not None
