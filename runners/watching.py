"""Watch-prompts: one set of questions at step 0, each checkpoint and at last, greedily."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneyard.runners.chat import Chat
from tuneyard.runners.examples import begin_of
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.generation import Settings, Speaker

WATCHED_FILE = "watch_prompts.jsonl"
AT_ONCE = 8


@dataclass(frozen=True)
class Watch:
    """Questions as they were asked and as tokens, and who answers."""

    prompts: Sequence[str]
    encoded: Sequence[Sequence[int]]
    speaker: Speaker

    def answer(self, step: int) -> list[dict[str, Any]]:
        """A line for each question, in the order asked; what it says is the same every time."""
        said = []
        for start in range(0, len(self.encoded), AT_ONCE):
            said += self.speaker.answer(self.encoded[start : start + AT_ONCE], batch=start)
        return [
            {"step": step, "prompt": prompt, "text": answer.text}
            for prompt, answer in zip(self.prompts, said, strict=True)
        ]


def watched_settings(*, max_new_tokens: int, stop_ids: Sequence[int]) -> Settings:
    """Greedy, to the end of the turn."""
    return Settings(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        stop=(),
        stop_ids=tuple(stop_ids),
        seed=0,
    )


def encode_watched(
    prompts: Sequence[str], chat: Chat, *, plain: bool, longest: int
) -> list[list[int]]:
    """Questions as tokens: turns of a chat, or with ``plain`` text that is to be continued.

    Raises: BadSpec for one that is too long.
    """
    texts = list(prompts) if plain else [_asked(prompt, chat) for prompt in prompts]
    encoded = [(begin_of(chat) if plain else []) + ids for ids in chat.encode(texts)]
    for number, ids in enumerate(encoded):
        if len(ids) >= longest:
            raise BadSpec(
                f"It has {len(ids)} tokens; the model reads {longest - 1} before it answers.",
                field=f"watch_prompts[{number}]",
                hint="ask in fewer words",
            )
    return encoded


def _asked(prompt: str, chat: Chat) -> str:
    messages = chat.with_system([{"role": "user", "content": prompt}])
    return chat.render(messages, generation_prompt=True)
