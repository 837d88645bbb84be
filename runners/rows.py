"""Rows of a training file as conversations: JSON lines, a JSON array, CSV, Parquet; no torch.

Forms: alpaca (instruction, input, output, system, history; or prompt, completion), OpenAI chat
(messages, tools), ShareGPT (conversations of from and value, system). Nothing is substituted in
the texts.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tuneyard.runners.failures import BadData

Row = Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; the last one is the assistant's.

    trained: for each assistant message in order, whether its tokens are targets (OpenAI's weight).
    """

    messages: Sequence[Message]
    trained: Sequence[bool]
    line: int
    tools: Sequence[Mapping[str, Any]] | None = None


def read_conversations(path: Path, *, limit: int | None = None) -> list[Conversation]:
    """Read a training file; with ``limit`` its first rows only.

    Raises: BadData, which names the line of the first bad row.
    """
    found: list[Conversation] = []
    for line, row in read_rows(path):
        if limit is not None and len(found) >= limit:
            break
        found.append(_conversation(row, line))
    if not found:
        raise BadData("The file has no rows.", hint="one JSON object per line, or a JSON array")
    return found


def count_conversations(path: Path) -> int:
    """How many rows a training file has; none is kept. Raises: BadData, as reading it would."""
    rows = 0
    for line, row in read_rows(path):
        _conversation(row, line)
        rows += 1
    if not rows:
        raise BadData("The file has no rows.", hint="one JSON object per line, or a JSON array")
    return rows


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON array, JSON lines, CSV or Parquet, each with the line it begins on."""
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadData("This is not UTF-8.", line=line, hint="save the file as UTF-8") from None
    if path.suffix.lower() == ".csv":
        return _csv(text)
    return _array(text) if text.lstrip()[:1] == "[" else _lines(text)


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    """Columns by the names of the first line. A row's line is that of its end."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise BadData("This row has more columns than the first.", line=reader.line_num)
            yield reader.line_num, row
    except csv.Error as error:
        raise BadData(f"This is not CSV: {error}.", line=reader.line_num) from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, numbered; pyarrow reads it where it is installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        hint = "install pyarrow there, or take the data as json, jsonl or csv"
        raise BadData("Parquet needs pyarrow in the runner's environment.", hint=hint) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise BadData(f"This is not Parquet: {str(error)[:120]}.") from None


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also splits at U+2028, which JSON texts may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, first_line=number)


def _array(text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] in ("]", ""):
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except ValueError as error:
            _refuse(error, first_line=1)
        yield line, row


def _skip(text: str, position: int, blanks: str) -> int:
    while position < len(text) and text[position] in blanks:
        position += 1
    return position


def _parse(text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        _refuse(error, first_line=first_line)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(error: ValueError, *, first_line: int) -> NoReturn:
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        message = f"This is not JSON: {error.msg}, column {error.colno}."
        raise BadData(message, line=line) from None
    raise BadData(f"{error}.", line=first_line) from None


def _conversation(row: Any, line: int) -> Conversation:
    if not isinstance(row, Mapping):
        raise BadData("A row is a JSON object.", line=line, hint=FORMS)
    for column, read in _FORMS.items():
        if column in row:
            return _checked(read(row, line))
    raise BadData(f"No column of a known form among {sorted(row)[:8]}.", line=line, hint=FORMS)


FORMS = "alpaca: instruction, input, output; OpenAI: messages; ShareGPT: conversations"


def _alpaca(row: Row, line: int) -> Conversation:
    system = _text(row, "system", line, default="")
    question = "\n".join(filter(None, (_text(row, c, line, default="") for c in ASKED)))
    messages = [{"role": "system", "content": system}] if system else []
    for pair in row.get("history") or ():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_text, pair))):
            raise BadData("history is a list of [question, answer].", line=line, field="history")
        messages += _exchange(*pair)
    messages += _exchange(question, _text(row, "output", line))
    return _all_trained(messages, line)


ASKED = ("instruction", "input")


def _completion(row: Row, line: int) -> Conversation:
    answer = _text(row, "completion", line)
    return _all_trained(_exchange(_text(row, "prompt", line), answer), line)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _openai(row: Row, line: int) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise BadData("messages is a list of objects.", line=line, field="messages")
    read = [_openai_message(m, i, line) for i, m in enumerate(messages)]
    trained = [bool(m.get("weight", 1)) for m in messages if m.get("role") == "assistant"]
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, first_line=line) if tools.strip() else None
    return Conversation(read, trained, line, tools or None)


ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _openai_message(message: Message, index: int, line: int) -> Message:
    where = f"messages[{index}]"
    role = message.get("role")
    if role not in ROLES:
        raise BadData(f"Role {role!r} is not one of {', '.join(ROLES)}.", line=line, field=where)
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined_parts(content, where, line)
    if not isinstance(content, str):
        raise BadData("content is not a text.", line=line, field=where)
    kept = {key: value for key, value in message.items() if key != "weight"}
    role = "system" if role == "developer" else role
    return kept | {"role": role, "content": content}


def _joined_parts(parts: Sequence[Any], where: str, line: int) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if len(texts) != len(parts) or not all(map(_is_text, texts)):
        raise BadData("Only text parts can be trained on.", line=line, field=where)
    return "".join(map(str, texts))


def _sharegpt(row: Row, line: int) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise BadData("conversations is a list of objects.", line=line, field="conversations")
    system = _text(row, "system", line, default="")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_sharegpt_message(t, i, line) for i, t in enumerate(turns)]
    return _all_trained(messages, line)


SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _sharegpt_message(turn: Row, index: int, line: int) -> dict[str, str]:
    where = f"conversations[{index}]"
    role = SPEAKERS.get(str(turn.get("from")))
    if role is None:
        raise BadData(
            f"from is {turn.get('from')!r}, not one of {', '.join(SPEAKERS)}.",
            line=line,
            field=where,
            hint="conversations with tools go into OpenAI's form: messages, tool_calls, tools",
        )
    if not isinstance(turn.get("value"), str):
        raise BadData("value is not a text.", line=line, field=where)
    return {"role": role, "content": turn["value"]}


_FORMS: Mapping[str, Callable[[Row, int], Conversation]] = {
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "prompt": _completion,
}


def _text(row: Row, column: str, line: int, *, default: str | None = None) -> str:
    value = row.get(column, default)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise BadData(f"{column} is not a text.", line=line, field=column)
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all_trained(messages: Sequence[Message], line: int) -> Conversation:
    answers = sum(m["role"] == "assistant" for m in messages)
    return Conversation(messages, [True] * answers, line)


def _checked(conversation: Conversation) -> Conversation:
    """What a template needs: somebody asks first, the assistant has the last word."""
    roles = [m["role"] for m in conversation.messages]
    line = conversation.line
    if "assistant" not in roles:
        raise BadData("No message is the assistant's: nothing to learn.", line=line)
    if roles[-1] != "assistant":
        raise BadData("The last message is not the assistant's.", line=line)
    if "system" in roles[1:]:
        raise BadData("A system message comes first or not at all.", line=line)
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise BadData("The assistant speaks before anybody asked.", line=line)
    return conversation
