"""Prompts of an inference job: JSON lines, a JSON list, or plain text with one prompt a line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.failures import BadData
from tuneyard.runners.rows import Message
from tuneyard.specs.conversations import A_PROMPT, check_prompt
from tuneyard.specs.errors import InputError
from tuneyard.specs.rows import each_once


@dataclass(frozen=True)
class Prompt:
    """A question as it was asked (``shown``, for the results) and as messages."""

    shown: Mapping[str, Any]
    messages: Sequence[Message]


def read_prompts(path: Path, *, system: str | None = None) -> list[Prompt]:
    """Read a file of prompts. Raises: BadData with the line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadData("This is not UTF-8.", hint="save the file as UTF-8") from None
    return prompts_of(_values(text), system=system)


def prompts_of(values: Sequence[tuple[int, Any]], *, system: str | None = None) -> list[Prompt]:
    """Prompts from values and the lines they stand on. Raises: BadData."""
    if not values:
        raise BadData("There are no prompts.", hint=f"each is {A_PROMPT}")
    return [_prompt(value, line, system) for line, value in values]


def _values(text: str) -> list[tuple[int, Any]]:
    """The file's values; whatever is no JSON object, string or list is taken as plain lines."""
    if text.lstrip()[:1] == "[":
        try:
            return list(enumerate(json.loads(text, object_pairs_hook=each_once), start=1))
        except ValueError:
            pass  # "[INST] …" is a prompt, too
    lines = [(i, line.strip("\r")) for i, line in enumerate(text.split("\n"), start=1)]
    lines = [(i, line) for i, line in lines if line.strip()]
    if not lines or not _is_json(lines[0][1]):
        return list(lines)
    return [(i, _parse(line, i)) for i, line in lines]


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str | dict)
    except ValueError:
        return False


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=each_once)
    except ValueError as error:
        raise BadData(f"This is not JSON: {error}.", line=number) from None


def _prompt(value: Any, line: int, system: str | None) -> Prompt:
    try:
        check_prompt(value)
    except InputError as error:
        raise BadData(error.message, line=line, field=error.field, hint=error.hint) from None
    if isinstance(value, Mapping) and "messages" in value:
        return Prompt({"messages": value["messages"]}, _led(value["messages"], system))
    text = value["prompt"] if isinstance(value, Mapping) else value
    return Prompt({"prompt": text}, _led([{"role": "user", "content": text}], system))


def _led(messages: Sequence[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]
