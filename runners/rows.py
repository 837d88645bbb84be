"""Rows of a training file as what a stage learns from; no torch.

Forms: alpaca (instruction, input, output, system, history; or prompt, completion), OpenAI chat
(messages, tools), ShareGPT (conversations of from and value, system, tools); of preferences the
same with chosen and rejected, of labelled answers with kto_tag or label; text. Nothing is
substituted in the texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuneyard.runners.failures import BadData
from tuneyard.runners.row_files import read_rows
from tuneyard.specs.errors import InputError
from tuneyard.specs.rows import (
    NEEDS,
    SPEAKERS,
    STAGE_OF,
    TRAINABLE,
    check_row,
    columns_of,
    read_calls,
)

Row = Mapping[str, Any]
Message = Mapping[str, Any]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; the last one is the assistant's.

    trained: for each assistant message in order, whether its tokens are targets (OpenAI's weight).
    """

    messages: Sequence[Message]
    trained: Sequence[bool]
    line: int
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def asked(self) -> Sequence[Message]:
        """What stands before the last answer."""
        return self.messages[:-1]


@dataclass(frozen=True)
class Preference:
    """One question with the answer that is wanted, and with the other one."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class Opinion:
    """An answer, and whether it is wanted."""

    answered: Conversation
    wanted: bool


@dataclass(frozen=True)
class Text:
    """Plain text to go on with."""

    text: str
    line: int


@dataclass(frozen=True)
class Unanswered:
    """Messages that the assistant has to answer, and what rewards may read beside them."""

    messages: Sequence[Message]
    columns: Mapping[str, Any]
    line: int
    tools: Sequence[Mapping[str, Any]] | None = None


StageRow = Conversation | Preference | Opinion | Text | Unanswered


def read_conversations(path: Path, *, limit: int | None = None) -> list[Conversation]:
    """The rows of stage sft. Raises: BadData, which names the line of the first bad row."""
    return _read(path, "sft", _conversation, limit)


def read_stage(path: Path, stage: str, *, limit: int | None = None) -> Sequence[StageRow]:
    """The rows of a training file; with ``limit`` its first rows only.

    Raises: BadData, which names the line of the first bad row.
    """
    return _read(path, stage, _STAGES[stage], limit)


def _read(
    path: Path, stage: str, parse: Callable[[Row, int], Read], limit: int | None
) -> list[Read]:
    found: list[Read] = []
    for line, row in read_rows(path):
        if limit is not None and len(found) >= limit:
            break
        kind = check(row, line)
        if kind not in TRAINABLE[stage]:
            message = f"A row of form {kind}, and stage {stage} needs {NEEDS[stage]}."
            raise BadData(message, line=line, hint=STAGE_OF.get(kind))
        found.append(parse(row, line))
    if not found:
        raise BadData("The file has no rows.", hint="one JSON object per line, or a JSON array")
    return found


def count_rows(path: Path) -> int:
    """How many rows a training file has, of any form. Raises: BadData, as reading it would."""
    rows = 0
    for line, row in read_rows(path):
        check(row, line)
        rows += 1
    if not rows:
        raise BadData("The file has no rows.", hint="one JSON object per line, or a JSON array")
    return rows


def check(row: Any, line: int) -> str:
    """The form of a row. Raises: BadData that names its line."""
    try:
        return check_row(row).kind
    except InputError as error:
        hint = error.as_dict().get("hint")
        raise BadData(error.message, line=line, field=error.field, hint=hint) from None


def _conversation(row: Row, line: int) -> Conversation:
    return next(read(row, line) for column, read in _FORMS.items() if column in row)


def _preference(row: Row, line: int) -> Preference:
    asked, tools = _asked(row), _tools(row)
    chosen, rejected = (
        _all_trained([*asked, *_answer(row[column])], line, tools)
        for column in ("chosen", "rejected")
    )
    return Preference(chosen, rejected)


def _opinion(row: Row, line: int) -> Opinion:
    return Opinion(_conversation(row, line), bool(row.get("kto_tag", row.get("label"))))


def _text(row: Row, line: int) -> Text:
    return Text(row["text"], line)


def _unanswered(row: Row, line: int) -> Unanswered:
    """A row's question; an answer that it holds is for the rewards."""
    messages = _asked(row)
    if isinstance(row.get("completion"), list):
        messages += _answer(row["completion"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    return Unanswered(messages, columns_of(row), line, _tools(row))


_STAGES: Mapping[str, Callable[[Row, int], StageRow]] = {
    "sft": _conversation,
    "pt": _text,
    "rm": _preference,
    "dpo": _preference,
    "kto": _opinion,
    "grpo": _unanswered,
    "rloo": _unanswered,
}


def _asked(row: Row) -> list[Message]:
    """The messages before an answer that stands in a column of its own."""
    if "messages" in row:
        return [_openai_message(m) for m in row["messages"]]
    if "conversations" in row:
        return [*_system(row), *_turns(row["conversations"])]
    if isinstance(row.get("prompt"), list):
        return [_openai_message(m) for m in row["prompt"]]
    question = row.get("instruction", row.get("prompt"))
    if question is None:
        return []
    return [*_system(row), *_history(row), _says("user", _joined(question, row.get("input")))]


def _answer(value: Any) -> list[Message]:
    """An answer as messages: a text, a message, or messages that end with it."""
    if isinstance(value, list):
        return [_openai_message(m) for m in value]
    if isinstance(value, Mapping):
        value = value.get("value", value.get("content"))
    return [_says("assistant", value)]


def _alpaca(row: Row, line: int) -> Conversation:
    return _all_trained([*_asked(row), _says("assistant", row["output"])], line)


def _completion(row: Row, line: int) -> Conversation:
    return _all_trained([*_asked(row), *_answer(row["completion"])], line)


def _system(row: Row) -> list[Message]:
    return [_says("system", row["system"])] if row.get("system") else []


def _history(row: Row) -> list[Message]:
    pairs = row.get("history") or ()
    return [
        _says(role, text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _joined(question: str, more: str | None) -> str:
    return "\n".join(filter(None, (question, more)))


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _openai(row: Row, line: int) -> Conversation:
    messages = row["messages"]
    trained = [bool(m.get("weight", 1)) for m in messages if m["role"] == "assistant"]
    return Conversation([_openai_message(m) for m in messages], trained, line, _tools(row))


def _tools(row: Row) -> Sequence[Mapping[str, Any]] | None:
    """The functions that an answer may call; an empty list is told from none."""
    given = row.get("tools")
    if isinstance(given, str):
        given = json.loads(given) if given.strip() else None
    tools: Sequence[Mapping[str, Any]] | None = given
    return tools


def _openai_message(message: Message) -> Message:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    kept = {key: value for key, value in message.items() if key != "weight"}
    role = "system" if message["role"] == "developer" else message["role"]
    return kept | {"role": role, "content": content}


def _sharegpt(row: Row, line: int) -> Conversation:
    messages = [*_system(row), *_turns(row["conversations"])]
    return _all_trained(messages, line, _tools(row))


def _turns(conversations: Sequence[Row]) -> list[Message]:
    return [_sharegpt_message(turn) for turn in conversations]


def _sharegpt_message(turn: Row) -> Message:
    if turn["from"] != "function_call":
        return _says(SPEAKERS[turn["from"]], turn["value"])
    calls = [{"type": "function", "function": call} for call in read_calls(turn["value"], "value")]
    return {"role": "assistant", "content": "", "tool_calls": calls}


_FORMS: Mapping[str, Callable[[Row, int], Conversation]] = {
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "prompt": _completion,
}


def _all_trained(
    messages: Sequence[Message], line: int, tools: Sequence[Mapping[str, Any]] | None = None
) -> Conversation:
    answers = sum(m["role"] == "assistant" for m in messages)
    return Conversation(messages, [True] * answers, line, tools)
