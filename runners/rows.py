"""Rows of a training file as conversations: JSON lines, a JSON array, CSV, Parquet; no torch.

Forms: alpaca (instruction, input, output, system, history; or prompt, completion), OpenAI chat
(messages, tools), ShareGPT (conversations of from and value, system, tools). Nothing is substituted
in the texts.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from tuneyard.runners.failures import BadData
from tuneyard.specs.errors import InputError
from tuneyard.specs.rows import SPEAKERS, TRAINABLE, check_row, each_once, read_calls

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
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=each_once)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] in ("]", ""):
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except ValueError as error:
            _refuse(error, first_line=1, row_line=line)
        yield line, row


def _skip(text: str, position: int, blanks: str) -> int:
    while position < len(text) and text[position] in blanks:
        position += 1
    return position


def _parse(text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=each_once)
    except ValueError as error:
        _refuse(error, first_line=first_line, row_line=first_line)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(error: ValueError, *, first_line: int, row_line: int) -> NoReturn:
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        message = f"This is not JSON: {error.msg}, column {error.colno}."
        raise BadData(message, line=line) from None
    raise BadData(f"{error}.", line=row_line) from None


def _conversation(row: Any, line: int) -> Conversation:
    try:
        kind = check_row(row).kind
    except InputError as error:
        hint = error.as_dict().get("hint")
        raise BadData(error.message, line=line, field=error.field, hint=hint) from None
    if kind not in TRAINABLE:
        raise BadData(f"A row of form {kind} has no answers that sft learns.", line=line)
    return next(read(row, line) for column, read in _FORMS.items() if column in row)


def _alpaca(row: Row, line: int) -> Conversation:
    messages = _system(row)
    for pair in row.get("history") or ():
        messages += _exchange(*pair)
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    return _all_trained(messages + _exchange(question, row["output"]), line)


def _completion(row: Row, line: int) -> Conversation:
    return _all_trained(_exchange(row["prompt"], row["completion"]), line)


def _system(row: Row) -> list[dict[str, str]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _openai(row: Row, line: int) -> Conversation:
    messages = row["messages"]
    trained = [bool(m.get("weight", 1)) for m in messages if m["role"] == "assistant"]
    tools = _tools(row.get("tools"))
    return Conversation([_openai_message(m) for m in messages], trained, line, tools or None)


def _openai_message(message: Message) -> Message:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    kept = {key: value for key, value in message.items() if key != "weight"}
    role = "system" if message["role"] == "developer" else message["role"]
    return kept | {"role": role, "content": content}


def _sharegpt(row: Row, line: int) -> Conversation:
    turns = [_sharegpt_message(turn) for turn in row["conversations"]]
    read = _all_trained(_system(row) + turns, line)
    return replace(read, tools=_tools(row.get("tools")))


def _sharegpt_message(turn: Row) -> Message:
    if turn["from"] != "function_call":
        return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
    calls = [{"type": "function", "function": call} for call in read_calls(turn["value"], "value")]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _tools(given: Any) -> Sequence[Mapping[str, Any]] | None:
    """The functions that an answer may call; a list that is empty is told from none at all."""
    if not isinstance(given, str):
        return given if given else None
    tools: Sequence[Mapping[str, Any]] | None = json.loads(given) if given.strip() else None
    return tools


_FORMS: Mapping[str, Callable[[Row, int], Conversation]] = {
    "messages": _openai,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "prompt": _completion,
}


def _all_trained(messages: Sequence[Message], line: int) -> Conversation:
    answers = sum(m["role"] == "assistant" for m in messages)
    return Conversation(messages, [True] * answers, line)
