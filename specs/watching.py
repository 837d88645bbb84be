"""Questions that a model is asked again and again while it learns."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import Spec, refusal
from tuneyard.specs.problems import problem

MAX_WATCHED = 16
MAX_WATCHED_TEXT = 4000


def _says_something(prompt: str) -> str:
    if not prompt.strip():
        raise refusal("empty_prompt", "is empty", "write a question, or leave it out")
    return prompt


def _each_once(prompts: list[str]) -> list[str]:
    if len(set(prompts)) < len(prompts):
        raise refusal("out_of_range", "asks one thing twice", "ask each once")
    return prompts


class WatchingFields(Spec):
    """What a fine-tune is asked at step 0, at every checkpoint and at last."""

    watch_prompts: (
        Annotated[
            list[
                Annotated[
                    str,
                    Field(min_length=1, max_length=MAX_WATCHED_TEXT),
                    AfterValidator(_says_something),
                ]
            ],
            Field(min_length=1, max_length=MAX_WATCHED),
            AfterValidator(_each_once),
        ]
        | None
    ) = Field(
        None,
        description="Questions answered at step 0, at every checkpoint and at last, greedily; "
        "stage pt goes on from them as plain text.",
    )
    watch_max_new_tokens: int = Field(
        64, ge=1, le=1024, description="Tokens of such an answer at most."
    )


def watching_clashes(spec: WatchingFields, *, stage: str) -> Iterator[InputError]:
    """A reward model has no words."""
    if spec.watch_prompts and stage == "rm":
        message = "A reward model gives scores and says nothing."
        yield problem("conflicting_fields", message, "watch_prompts", "leave it out")
