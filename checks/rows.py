"""What a row of a data set must look like: alpaca, OpenAI's chat, ShareGPT; and prompts."""

import difflib
from collections.abc import Mapping
from typing import Any

from tuneyard.specs.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = ("human", "gpt", "system", "function_call", "observation", "user", "assistant")
COLUMNS = (
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "prompt",
    "completion",
    "response",
    "messages",
    "conversations",
)
EXPECTED = (
    'expected {"instruction": …, "output": …}, {"messages": [{"role": …, "content": …}]}'
    ' or {"conversations": [{"from": …, "value": …}]}'
)


def check_row(row: Any) -> str:
    """The kind of a row: alpaca, openai or sharegpt. Raises: InputError without a line."""
    if not isinstance(row, Mapping):
        raise InputError("A row must be an object.", code="wrong_type", hint=EXPECTED)
    if "messages" in row:
        _check_messages(row["messages"])
        return "openai"
    if "conversations" in row:
        _check_conversations(row["conversations"])
        return "sharegpt"
    _check_alpaca(row)
    return "alpaca"


def check_prompt(row: Any) -> str:
    """A prompt: a text, {"prompt": …} or {"messages": […]}. Raises: InputError."""
    if isinstance(row, str):
        return "prompts"
    if isinstance(row, Mapping) and "messages" in row:
        _check_roles(row["messages"])
        return "prompts"
    text = row.get("prompt", row.get("instruction")) if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        hint = 'a text, {"prompt": …} or {"messages": […]}'
        raise InputError("This is no prompt.", code="missing_column", hint=hint)
    return "prompts"


def _check_alpaca(row: Mapping[str, Any]) -> None:
    asked = next((name for name in ("instruction", "prompt") if name in row), None)
    answered = next((name for name in ("output", "completion", "response") if name in row), None)
    if asked is None:
        raise _missing_column(row, "instruction")
    if answered is None:
        raise _missing_column(row, "output")
    for name in (asked, answered):
        _check_text(row[name], name)
    for name in ("input", "system"):
        if row.get(name) is not None:
            _check_text(row[name], name)
    if not row[answered].strip():
        message = f"{answered} is empty: there is nothing to learn."
        raise InputError(message, code="no_trainable_tokens", field=answered)
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in history
    )
    if not pairs:
        message = "history must be a list of [question, answer]."
        raise InputError(message, code="wrong_type", field="history")


def _missing_column(row: Mapping[str, Any], wanted: str) -> InputError:
    near = [name for name in row if difflib.get_close_matches(str(name), COLUMNS, n=1, cutoff=0.7)]
    odd = [name for name in near if name not in COLUMNS]
    hint = EXPECTED
    if odd:
        meant = difflib.get_close_matches(str(odd[0]), COLUMNS, n=1, cutoff=0.7)[0]
        hint = f"did {odd[0]!r} mean {meant!r}? {EXPECTED}"
    return InputError(
        f"There is no column {wanted!r}.", code="missing_column", field=wanted, hint=hint
    )


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        message = f"{name} must be a text, not {type(value).__name__}."
        raise InputError(message, code="wrong_type", field=name)


def _check_roles(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        message = "messages must be a list that is not empty."
        raise InputError(message, code="wrong_type", field="messages", hint=EXPECTED)
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(
                f"{field} has no role.", code="missing_column", field=field, hint=EXPECTED
            )
        if message["role"] not in ROLES:
            text = f"{field}.role = {str(message['role'])[:40]!r} is unknown."
            hint = f"one of {', '.join(ROLES)}"
            raise InputError(text, code="unknown_role", field=field, hint=hint)
        if message.get("content") is None and message.get("tool_calls"):
            continue
        _check_text(message.get("content"), f"{field}.content")


def _check_messages(messages: Any) -> None:
    _check_roles(messages)
    learned = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1) != 0]
    if any(m.get("weight", 1) not in (0, 1) for m in messages):
        raise InputError("weight must be 0 or 1.", code="out_of_range", field="messages")
    if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in learned):
        message = "No answer of the assistant to learn from."
        raise InputError(message, code="no_trainable_tokens", field="messages")


def _check_conversations(turns: Any) -> None:
    if not isinstance(turns, list) or not turns:
        message = "conversations must be a list that is not empty."
        raise InputError(message, code="wrong_type", field="conversations", hint=EXPECTED)
    for position, turn in enumerate(turns):
        field = f"conversations[{position}]"
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise InputError(
                f"{field} has no `from`.", code="missing_column", field=field, hint=EXPECTED
            )
        if turn["from"] not in SHAREGPT_ROLES:
            text = f"{field}.from = {str(turn['from'])[:40]!r} is unknown."
            hint = f"one of {', '.join(SHAREGPT_ROLES)}"
            raise InputError(text, code="unknown_role", field=field, hint=hint)
        _check_text(turn.get("value"), f"{field}.value")
    if not any(t["from"] in ("gpt", "assistant") and t["value"].strip() for t in turns):
        message = "No answer of the assistant to learn from."
        raise InputError(message, code="no_trainable_tokens", field="conversations")
