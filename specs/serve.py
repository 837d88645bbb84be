"""What ``kind: serve`` may say, and what one question to such a job looks like."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from tuneyard.specs.conversations import check_prompt
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.fields import AdapterRef, ModelRef, Spec, Text
from tuneyard.specs.generation import Generation
from tuneyard.specs.llamafactory import SAME_AS
from tuneyard.specs.problems import nearest, problem, problems_of

MAX_MESSAGES = 2000
MAX_IDLE_S = 7 * 24 * 3600


class ServeSpec(Generation, Spec):
    """Keep a model loaded and answer questions, until nobody asks any more."""

    kind: Literal["serve"] = "serve"
    model: ModelRef = Field(description="A base or a tuned model: an id, a name, or {from: a job}.")
    adapter: AdapterRef | None = Field(None, description="An adapter over that base.")
    template: Text | None = Field(
        None, description="Chat template; unset: the one that trained, or the tokenizer's own."
    )
    default_system: Text | None = Field(
        None, description="System text of conversations without one; unset: the one that trained."
    )
    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="Unset: each answer is drawn anew."
    )
    idle_s: float = Field(
        600, gt=0, le=MAX_IDLE_S, description="After so many seconds without a question it ends."
    )

    @property
    def wants_gpu(self) -> bool:
        """Generation goes to a GPU where there is one."""
        return True


class ChatRequest(Generation):
    """A conversation that waits for its answer; what it leaves open the job's spec says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    messages: list[dict[str, Any]] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description='The whole conversation: [{"role": "user", "content": "…"}, …].',
    )
    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="The same seed draws the same answer."
    )
    stream: bool = Field(False, description="true: server-sent events as the answer grows.")

    def question(self) -> dict[str, Any]:
        """What the runner is asked."""
        return self.model_dump(mode="json", exclude={"stream"}, exclude_none=True)


def read_chat(document: Mapping[str, Any]) -> ChatRequest:
    """Check a question. Raises: SpecRejected with all problems, each with its field and mend."""
    asked = {SAME_AS.get(name, name): value for name, value in document.items()}
    known = ChatRequest.model_fields
    problems: list[InputError] = [_unknown(name) for name in asked if name not in known]
    try:
        request = ChatRequest.model_validate({k: v for k, v in asked.items() if k in known})
        if not problems:
            check_prompt({"messages": request.messages})
            return request
    except ValidationError as error:
        problems += problems_of(error, ChatRequest)
    except InputError as error:
        problems.append(error)
    raise SpecRejected(problems)


def _unknown(name: str) -> InputError:
    near = nearest(name, ChatRequest.model_fields)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(ChatRequest.model_fields)}"
    return problem("unknown_field", f"There is no field {name[:60]!r} here.", name[:60], hint)
