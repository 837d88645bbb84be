"""What ``kind: inference`` may say."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from tuneyard.specs.conversations import A_PROMPT, all_within, check_prompt
from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import MAX_TEXT, AdapterRef, FileRef, ModelRef, Spec, Text, refusal
from tuneyard.specs.generation import Generation

MAX_PROMPTS = 10_000


def _checked(prompt: Any) -> Any:
    try:
        check_prompt(prompt)
    except InputError as error:
        text = f"is no prompt: {error.message[:1].lower()}{error.message[1:].rstrip('.')}"
        raise refusal(error.code, text, error.hint) from None
    wanted = "messages" if "messages" in prompt else "prompt"
    unknown = [name for name in prompt if name != wanted] if isinstance(prompt, dict) else []
    if unknown:
        text = f"holds {unknown[0][:60]!r} beside {wanted}"
        raise refusal("unknown_field", text, f"give {A_PROMPT}")
    if any(len(text) > MAX_TEXT for text in all_within(prompt) if isinstance(text, str)):
        raise refusal("too_long", f"is longer than {MAX_TEXT:,} characters", _AS_A_FILE)
    return prompt


_AS_A_FILE = "long prompts go into a file of prompts, which is uploaded"


def _form_of_prompt(value: Any) -> str:
    return "<object>" if isinstance(value, dict) else "<text>"


def _form_of_prompts(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<file>"


Prompt = Annotated[
    Annotated[str, AfterValidator(_checked), Tag("<text>")]
    | Annotated[dict[str, Any], AfterValidator(_checked), Tag("<object>")],
    Discriminator(_form_of_prompt),
]
Prompts = Annotated[
    Annotated[FileRef, Tag("<file>")]
    | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<list>")],
    Discriminator(_form_of_prompts),
]


class InferenceSpec(Generation, Spec):
    """Answer prompts by a base model, or by a base and an adapter."""

    kind: Literal["inference"] = "inference"
    model: ModelRef = Field(description="A base or a tuned model: an id, a name, or {from: a job}.")
    adapter: AdapterRef | None = Field(None, description="An adapter over that base.")
    prompts: Prompts = Field(
        description="A file of prompts, or a list of texts or {messages: […]}."
    )
    system: Text | None = Field(None, description="System text where a prompt has none.")
    template: Text | None = Field(
        None, description="Chat template; unset: the one that trained, or the tokenizer's own."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="What is drawn follows from it.")
    batch_size: int = Field(8, ge=1, le=4096, description="Prompts at a time.")

    @property
    def wants_gpu(self) -> bool:
        """Generation goes to a GPU where there is one."""
        return True
