"""What messages and prompts must look like, whether they come in a spec or in a file."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuneyard.specs.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
A_PROMPT = 'a text, {"prompt": …} or {"messages": [{"role": …, "content": …}]}'

UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""What PostgreSQL cannot hold in a text: NUL, and half a character."""


def check_prompt(prompt: Any) -> None:
    """A prompt is a text, {"prompt": text} or {"messages": […]}. Raises: InputError."""
    if isinstance(prompt, Mapping) and "messages" in prompt:
        check_messages(prompt["messages"])
        if prompt["messages"][-1]["role"] == "assistant":
            message = "The last message is the assistant's already."
            raise InputError(
                message, code="bad_turns", field="messages", hint="end with a question"
            )
        return
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if text is None:
        raise InputError(
            "There is no prompt.", code="missing_column", field="prompt", hint=f"give {A_PROMPT}"
        )
    check_text(text, "prompt")
    if not text.strip():
        hint = "write a question, or leave the prompt out"
        raise InputError("The prompt is empty.", code="empty_prompt", field="prompt", hint=hint)


def check_messages(messages: Any) -> None:
    """Messages with a known role and a text each. Raises: InputError."""
    if not isinstance(messages, list) or not messages:
        message = "messages must be a list that is not empty."
        hint = 'for example [{"role": "user", "content": "Who are you?"}]'
        raise InputError(message, code="wrong_type", field="messages", hint=hint)
    for position, each in enumerate(messages):
        field = f"messages[{position}]"
        check_role(each, field)
        check_text(each.get("content"), f"{field}.content")


def check_role(message: Any, field: str) -> None:
    """A message is an object with one of ROLES. Raises: InputError."""
    if not isinstance(message, Mapping) or "role" not in message:
        hint = f"one of {', '.join(ROLES)}"
        raise InputError(f"{field} has no role.", code="missing_column", field=field, hint=hint)
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        text = f"{field}.role = {str(role)[:40]!r} is unknown."
        raise InputError(text, code="unknown_role", field=field, hint=f"one of {', '.join(ROLES)}")


def check_text(value: Any, field: str) -> None:
    """A text that can be stored and tokenised. Raises: InputError."""
    if not isinstance(value, str):
        kind = JSON_NAMES.get(type(value).__name__, "something else")
        message = f"{field} must be a text, not {kind}."
        hint = "write it within quotes" if kind in _PLAIN else 'a text, such as "Who are you?"'
        if value is None:
            hint = "write the text, or leave the row out"
        raise InputError(message, code="wrong_type", field=field, hint=hint)
    found = UNSTORABLE.search(value)
    if found:
        message = f"{field} holds U+{ord(found.group()):04X}, which is no character of a text."
        raise InputError(message, code="bad_character", field=field, hint="remove it")


_PLAIN = ("a number", "true or false")
JSON_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "list": "a list",
    "dict": "an object",
}
"""Python's type -> what JSON calls it."""


def all_within(value: Any) -> Iterator[Any]:
    """All that stands in an object or a list, names included, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from all_within(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from all_within(inner)
    else:
        yield value
