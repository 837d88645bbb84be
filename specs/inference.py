"""What ``kind: inference`` may say."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tuneyard.specs.fields import Ref, Spec

Messages = Annotated[dict[str, Any], Field(examples=[{"messages": [{"role": "user"}]}])]


class InferenceSpec(Spec):
    """Answer prompts by a base model, or by a base and an adapter."""

    kind: Literal["inference"] = "inference"
    model: Ref = Field(description="A base or a tuned model: an id, a name, or {from: a job}.")
    adapter: Ref | None = Field(None, description="An adapter over that base.")
    prompts: Ref | Annotated[list[str | Messages], Field(min_length=1, max_length=10_000)] = Field(
        description="A file of prompts, or a list of texts or {messages: […]}."
    )
    system: str | None = Field(None, description="System text where a prompt has none.")
    max_new_tokens: int | None = Field(
        None, ge=1, le=1_048_576, description="Tokens of an answer at most; unset: the model's end."
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0: the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus that is drawn from.")
    top_k: int | None = Field(None, ge=0, description="Likeliest tokens that are drawn from.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Above 1: fewer.")
    do_sample: bool | None = Field(None, description="False: the likeliest token.")
    stop: str | list[str] | None = Field(None, description="Texts that end an answer.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="What is drawn follows from it.")
    batch_size: int = Field(8, ge=1, le=4096, description="Prompts at a time.")

    @property
    def wants_gpu(self) -> bool:
        """Generation goes to a GPU where there is one."""
        return True
