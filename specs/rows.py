"""What a row of a data set must look like, in each of the forms that users bring.

checks/ calls it at submission, runners/rows.py before it reads a row: both accept the same. Forms
for other stages are known so that a submission can say so.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tuneyard.specs.conversations import check_role, check_text
from tuneyard.specs.errors import InputError

Row = Mapping[str, Any]

EXPECTED = (
    'expected {"instruction": …, "output": …}, {"messages": [{"role": …, "content": …}]}'
    ' or {"conversations": [{"from": …, "value": …}]}'
)
COLUMNS = (
    "instruction", "input", "output", "system", "history", "prompt", "completion", "messages",
    "conversations", "tools", "text", "chosen", "rejected", "kto_tag", "label",
)  # fmt: skip
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}
"""ShareGPT's ``from`` -> role."""

ANSWERS = frozenset({"alpaca", "openai", "sharegpt"})

TRAINABLE: Mapping[str, frozenset[str]] = {
    "sft": ANSWERS,
    "pt": frozenset({"text"}),
    "rm": frozenset({"preference"}),
    "dpo": frozenset({"preference"}),
    "kto": frozenset({"kto"}),
    "grpo": ANSWERS | {"question"},
    "rloo": ANSWERS | {"question"},
}
"""Stage -> forms of rows that it learns from."""

NEEDS: Mapping[str, str] = {
    "sft": "answers",
    "pt": "texts",
    "rm": "chosen and rejected answers",
    "dpo": "chosen and rejected answers",
    "kto": "answers with a label",
    "grpo": "questions",
    "rloo": "questions",
}
"""Stage -> what its rows must hold, in words."""

STAGE_OF: Mapping[str, str] = {
    "text": "rows of text are for stage pt",
    "preference": "rows of chosen and rejected are for stage dpo or rm",
    "kto": "rows with a label are for stage kto",
    "question": "rows of questions without an answer are for stages grpo and rloo",
    "alpaca": "rows with one answer are for stage sft",
    "openai": "rows with one answer are for stage sft",
    "sharegpt": "rows with one answer are for stage sft",
}
"""Form of a row -> where it belongs."""


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names comes twice, for json's ``object_pairs_hook``.

    Raises: ValueError; which of the two was meant is not guessed.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is given twice")
    return found


class MissingColumn(InputError):
    """A row lacks a column; the near name is looked for only when the error is shown."""

    code = "missing_column"

    def __init__(self, row: Row, wanted: str) -> None:
        super().__init__(f"There is no column {wanted!r}.", field=wanted)
        self._columns = list(row)[:20]

    def as_dict(self) -> dict[str, Any]:
        """With the mend."""
        return super().as_dict() | {"hint": self._near()}

    @property
    def means_other(self) -> bool:
        """Whether a column of the row looks like a slip of the pen."""
        return self._near() != EXPECTED

    def _near(self) -> str:
        for name in self._columns:
            near = difflib.get_close_matches(name[:40].lower(), COLUMNS, n=1, cutoff=0.7)
            if near and name not in COLUMNS:
                return f"did {name[:40]!r} mean {near[0]!r}? {EXPECTED}"
        return EXPECTED


def looks_like_json(text: str) -> bool:
    """Whether a file that may be plain text is JSON: ``[INST] …`` and ``{curly} …`` are not.

    >>> [looks_like_json(text) for text in ('{"a": 1}', '[{', '[Chapter 1]', '{curly}')]
    [True, True, False, False]
    """
    return re.match(r"\s*(?:\[\s*(?:[{\]]|$)|\{\s*(?:[\"}]|$))", text) is not None


class Judged(NamedTuple):
    """A row in order. teaches: it holds an answer that is not empty."""

    kind: str
    teaches: bool = True


def check_row(row: Any) -> Judged:
    """The form of a row. Raises: InputError with its field, without a line."""
    if not isinstance(row, Mapping):
        raise InputError("A row must be an object.", code="wrong_type", hint=EXPECTED)
    _check_media(row)
    for column, check in _FORMS.items():
        if column in row:
            return check(row)
    raise MissingColumn(row, "instruction")


def _check_media(row: Row) -> None:
    """Text alone is learned: nobody shall believe that a picture was."""
    held = next((name for name in MEDIA if row.get(name)), None)
    if held is not None:
        message = f"The row has {held}, and text alone can be learned."
        raise InputError(message, code="not_text", field=held, hint="leave such rows out")


def _preference(row: Row) -> Judged:
    """A question and two answers: each a text, a message, or messages that end with it."""
    if "rejected" not in row:
        raise MissingColumn(row, "rejected")
    asked = _roles_asked(row)
    answers = [_answer(row[column], column) for column in ("chosen", "rejected")]
    before = [roles for roles, _ in answers]
    if before[0] != before[1]:
        message = "chosen and rejected answer different questions."
        raise InputError(
            message, code="bad_turns", field="rejected", hint="one question, two answers"
        )
    _check_question(row, asked + before[0])
    _check_tools(row.get("tools"))
    return Judged("preference", any(text.strip() for _, text in answers))


def _check_question(row: Row, roles: list[str]) -> None:
    """Somebody asks before the answer that is judged."""
    if not roles:
        raise MissingColumn(row, "prompt")
    if roles[-1] == "assistant":
        message = "An answer stands where the question should be."
        hint = "end the prompt with a question"
        raise InputError(message, code="bad_turns", field="prompt", hint=hint)
    _check_turns([*roles, "assistant"], "prompt")


def _roles_asked(row: Row) -> list[str]:
    """Who speaks before the answers; the columns are checked on the way."""
    if "messages" in row or "conversations" in row or isinstance(row.get("prompt"), list):
        name = next(n for n in ("messages", "conversations", "prompt") if n in row)
        _check_list(row[name], name)
        if name == "conversations":
            speakers = [_speaker(turn, f"{name}[{i}]") for i, turn in enumerate(row[name])]
            return _system(row) + [SPEAKERS[each] for each in speakers]
        return [_role(message, f"{name}[{i}]") for i, message in enumerate(row[name])]
    question = "instruction" if "instruction" in row else "prompt"
    if question not in row:
        return []
    check_text(row[question], question)
    _check_beside(row)
    return [*_system(row), "user"]


def _role(message: Any, field: str) -> str:
    check_role(message, field)
    _check_content(message, field)
    return "system" if message["role"] == "developer" else str(message["role"])


def _answer(value: Any, field: str) -> tuple[list[str], str]:
    """The roles that stand before an answer, and its text."""
    if isinstance(value, list):
        _check_list(value, field)
        roles = [_role(message, f"{field}[{i}]") for i, message in enumerate(value)]
        if roles[-1] != "assistant":
            message = f"The last message of {field} is not the assistant's."
            raise InputError(message, code="bad_turns", field=field, hint="end with the answer")
        return roles[:-1], _text_of(value[-1].get("content"))
    if isinstance(value, Mapping):
        value = value.get("value", value.get("content"))
    check_text(value, field)
    return [], str(value)


def _messages(row: Row) -> Judged:
    messages = row["messages"]
    _check_list(messages, "messages")
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        check_role(message, field)
        _check_content(message, field)
        if message.get("weight", 1) not in (0, 1):
            raise InputError(
                "weight must be 0 or 1.",
                code="out_of_range",
                field=f"{field}.weight",
                hint="0: not learned, 1: learned",
            )
    roles = ["system" if m["role"] == "developer" else m["role"] for m in messages]
    _check_tools(row.get("tools"))
    if roles[-1] in ASKING:
        return _question(roles, "messages", _text_of(messages[-1]["content"]))
    _check_turns(roles, "messages")
    answers = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    teaches = any(m.get("tool_calls") or _text_of(m["content"]).strip() for m in answers)
    return Judged("kto" if _labelled(row) else "openai", teaches)


def _check_content(message: Row, field: str) -> None:
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, list):
        check_text(content, f"{field}.content")
        return
    for position, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        check_text(text, f"{field}.content[{position}].text")


def _text_of(content: Any) -> str:
    parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return "".join(parts)


MEDIA = ("images", "videos", "audios")
"""Columns of data sets that are not of text alone."""

TOOLS = 'a list as OpenAI has it: [{"type": "function", "function": {…}}]'


def _check_tools(tools: Any) -> None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            message = "tools is a text that is not JSON."
            raise InputError(message, code="wrong_type", field="tools", hint=TOOLS) from None
    if tools and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        message = "tools must be a list of objects."
        raise InputError(message, code="wrong_type", field="tools", hint=TOOLS)


def _conversations(row: Row) -> Judged:
    turns = row["conversations"]
    _check_list(turns, "conversations")
    speakers = [_speaker(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    roles = _system(row) + [SPEAKERS[each] for each in speakers]
    if roles[-1] in ASKING:
        return _question(roles, "conversations", turns[-1]["value"])
    _check_turns(roles, "conversations")
    _check_tools(row.get("tools"))
    teaches = any(
        SPEAKERS[speaker] == "assistant" and turn["value"].strip()
        for speaker, turn in zip(speakers, turns, strict=True)
    )
    return Judged("kto" if _labelled(row) else "sharegpt", teaches)


CALL = 'for example {"name": "weather", "arguments": {"city": "Rome"}}, or a list of such'


def read_calls(text: str, field: str) -> list[dict[str, Any]]:
    """The functions that a ``function_call`` turn calls. Raises: InputError."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        named = isinstance(call, Mapping) and isinstance(call.get("name"), str)
        if not named or "arguments" not in call:
            message = f"{field} is no call of a function in JSON."
            raise InputError(message, code="wrong_type", field=field, hint=CALL)
    return calls


def _system(row: Row) -> list[str]:
    if row.get("system") is not None:
        check_text(row["system"], "system")
    return ["system"] if row.get("system") else []


def _speaker(turn: Any, field: str) -> str:
    if not isinstance(turn, Mapping) or "from" not in turn:
        message = f"{field} has no `from`."
        raise InputError(message, code="missing_column", field=field, hint=EXPECTED)
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        text = f"{field}.from = {str(speaker)[:40]!r} is unknown."
        hint = f"one of {', '.join(SPEAKERS)}"
        raise InputError(text, code="unknown_role", field=field, hint=hint)
    check_text(turn.get("value"), f"{field}.value")
    if speaker == "function_call":
        read_calls(turn["value"], f"{field}.value")
    return speaker


def _check_list(value: Any, field: str) -> None:
    if not isinstance(value, list) or not value:
        message = f"{field} must be a list that is not empty."
        raise InputError(message, code="wrong_type", field=field, hint=EXPECTED)


def _check_turns(roles: Sequence[str], field: str) -> None:
    """Somebody asks first, the assistant has the last word: chat templates want it so."""
    if "assistant" not in roles:
        message = "No answer of the assistant to learn from."
        raise InputError(message, code="no_trainable_tokens", field=field, hint="add its answer")
    wrong = None
    if roles[-1] != "assistant":
        wrong = "The last message is not the assistant's"
    elif "system" in roles[1:]:
        wrong = "A system message comes first, once, or not at all"
    elif roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        wrong = "The assistant speaks before anybody asked"
    if wrong:
        hint = "system at most once and first, then a question, and an answer at the end"
        raise InputError(f"{wrong}.", code="bad_turns", field=field, hint=hint)


ASKING = frozenset({"user", "tool"})
"""Roles after which the assistant has the word."""


def _question(roles: Sequence[str], field: str, text: str) -> Judged:
    """What the assistant has still to answer, which only some stages learn from."""
    _check_turns([*roles, "assistant"], field)
    if not text.strip():
        hint = "write what the model is to answer"
        raise InputError("The question is empty.", code="empty_prompt", field=field, hint=hint)
    return Judged("question")


def _asks(row: Row, missing: str) -> Judged:
    """A question in a column of its own. Raises: MissingColumn where an answer has another name."""
    absent = MissingColumn(row, missing)
    if absent.means_other:
        raise absent
    roles = _roles_asked(row)
    asked = row.get("instruction", row.get("prompt"))
    return _question(
        roles, "prompt", _text_of(asked[-1]["content"] if isinstance(asked, list) else asked)
    )


def _alpaca(row: Row) -> Judged:
    if "output" not in row:
        return _asks(row, "output")
    check_text(row["instruction"], "instruction")
    check_text(row["output"], "output")
    _check_beside(row)
    kind = "kto" if _labelled(row) else "alpaca"
    return Judged(kind, bool(row["output"].strip()))


def _check_beside(row: Row) -> None:
    """What may stand beside a question."""
    for column in ("input", "system"):
        if row.get(column) is not None:
            check_text(row[column], column)
    _check_history(row.get("history"))


def _check_history(history: Any) -> None:
    if history in (None, "", []):
        return
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    )
    if not pairs:
        message = "history must be a list of [question, answer]."
        hint = 'for example [["Who are you?", "I am Tuny."]]'
        raise InputError(message, code="wrong_type", field="history", hint=hint)
    for position, pair in enumerate(history):
        for text in pair:
            check_text(text, f"history[{position}]")


def _completion(row: Row) -> Judged:
    if "completion" not in row:
        return _asks(row, "completion")
    asked = _roles_asked(row)
    before, text = _answer(row["completion"], "completion")
    _check_question(row, asked + before)
    _check_tools(row.get("tools"))
    return Judged("kto" if _labelled(row) else "alpaca", bool(text.strip()))


def _text(row: Row) -> Judged:
    check_text(row["text"], "text")
    return Judged("text", bool(row["text"].strip()))


def _labelled(row: Row) -> bool:
    """Whether a row says of its answer that it is wanted or not."""
    if "kto_tag" in row and not isinstance(row["kto_tag"], bool):
        message = "kto_tag must be true or false."
        raise InputError(message, code="wrong_type", field="kto_tag", hint="without quotes")
    return isinstance(row.get("kto_tag", row.get("label")), bool)


_FORMS: Mapping[str, Callable[[Row], Judged]] = {
    "chosen": _preference,
    "messages": _messages,
    "conversations": _conversations,
    "instruction": _alpaca,
    "prompt": _completion,
    "text": _text,
}
"""Column that tells a form -> its check, in this order."""


def columns_of(row: Row) -> dict[str, str | int | float | bool]:
    """What rewards may read of a row: its plain values; ``answer`` is the one that it holds."""
    held = {name: value for name, value in row.items() if name not in _ASKED}
    found = {name: value for name, value in held.items() if isinstance(value, str | int | float)}
    if "answer" not in found and (answer := _answer_of(row)) is not None:
        found["answer"] = answer
    return found


_ASKED = frozenset({"instruction", "input", "system", "prompt"})


def _answer_of(row: Row) -> str | None:
    """The text of the answer that a row's form holds, if it holds one."""
    value = next((row[n] for n in ("output", "completion", "messages") if n in row), None)
    if isinstance(value, list):
        return _text_of(value[-1].get("content")) if value[-1]["role"] == "assistant" else None
    if "conversations" in row:
        last = row["conversations"][-1]
        return str(last["value"]) if SPEAKERS[last["from"]] == "assistant" else None
    if isinstance(value, Mapping):
        value = value.get("value", value.get("content"))
    return value if isinstance(value, str) else None
