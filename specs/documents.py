"""Reading JSON and YAML strictly: what is odd is refused with its line, nothing is guessed."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from tuneyard.specs.conversations import UNSTORABLE, all_within
from tuneyard.specs.errors import InputError
from tuneyard.specs.jobs import TEXT_FIELDS
from tuneyard.specs.yaml_documents import NULL, read_yaml_text

__all__ = ["MalformedDocument", "apply_overrides", "read_json", "read_yaml"]

MAX_DEPTH = 50

# Possessive, and an end is optional: linear in whatever a stranger sends.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_TOKEN = re.compile(_STRING + r"|[\[\]{}]|[^\s\[\]{}\",:]++", re.DOTALL)


class MalformedDocument(InputError):
    """This cannot be read as JSON."""

    code = "malformed_json"
    http_status = 400

    def __init__(self, message: str, *, column: int | None = None, **more: Any) -> None:
        super().__init__(message, **more)
        self.column = column


def read_json(content: bytes | str) -> dict[str, Any]:
    """Read one JSON object. Raises: MalformedDocument with line and column, InputError."""
    text = _decode(content)
    if not text.strip():
        raise InputError("An object of names and values is expected.", code="not_an_object")
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        raise _malformed(text, error.pos, reason) from None
    except _OddToken as odd:
        raise _malformed(text, _place_of(text, odd.token), odd.reason) from None
    except _Twice as twice:
        place = _second_place_of(text, twice.name)
        reason = f"{twice.name[:80]!r} is given twice"
        raise _malformed(text, place, reason, code="duplicate_key", field=twice.name[:80]) from None
    return _checked(value)


def read_yaml(content: bytes | str) -> dict[str, Any]:
    """Read one YAML document of names and values. Raises: InputError with code and line.

    A field that takes a text gets it as it is written: ``name: no``, ``name: 010``.
    """
    return _checked(read_yaml_text(_decode(content, code="bad_yaml"), texts=TEXT_FIELDS))


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set ``key=value`` pairs; values are read as in YAML, a text is taken as it is.

    Raises: InputError that names the key.
    """
    changed = dict(document)
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            hint = "for example --set lora_rank=16"
            raise InputError(f"{override[:80]!r} is not key=value.", code="bad_override", hint=hint)
        changed[name] = _override(name, text.strip())
    return _checked(changed)


def _override(name: str, text: str) -> Any:
    if name in TEXT_FIELDS and text not in NULL and text[0] not in "[{\"'":
        return text
    try:
        read = read_yaml_text(f"{_VALUE}: {text}")
    except InputError as error:
        reason = error.message.partition(": ")[2] or error.message
        raise InputError(f"{name}: {reason}", code=error.code, field=name) from None
    if set(read) != {_VALUE}:
        raise InputError(f"{name} must be one value.", code="bad_override", field=name)
    return read[_VALUE]


_VALUE = "value"


class _OddToken(Exception):
    def __init__(self, token: str, reason: str) -> None:
        super().__init__(reason)
        self.token, self.reason = token, reason


class _Twice(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _refuse_constant(token: str) -> Any:
    raise _OddToken(token, f"{token} is not JSON")


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise _OddToken(token, f"{token[:40]} is beyond all numbers")
    return value


def _whole(token: str) -> int:
    if len(token) > 400:
        raise _OddToken(token, "this number is too long")
    return int(token)


def _malformed(text: str, place: int, reason: str, **more: Any) -> MalformedDocument:
    line = text.count("\n", 0, place) + 1
    column = place - text.rfind("\n", 0, place)
    message = f"Line {line}, column {column}: {reason}."
    return MalformedDocument(message, line=line, column=column, **more)


def _place_of(text: str, token: str) -> int:
    found = (m.start() for m in _TOKEN.finditer(text) if m.group() == token)
    return next(found, 0)


def _second_place_of(text: str, name: str) -> int:
    """Where an object says ``name`` for the second time."""
    seen: list[set[str] | None] = []
    for match in _TOKEN.finditer(text):
        piece = match.group()
        if piece in "[{":
            seen.append(set() if piece == "{" else None)
        elif piece in "]}":
            seen.pop()
        elif piece[0] == '"' and seen and seen[-1] is not None and _is_key(text, match.end()):
            key = json.loads(piece)
            if key == name and key in seen[-1]:
                return match.start()
            seen[-1].add(key)
    return 0


def _is_key(text: str, end: int) -> bool:
    while text[end : end + 1].isspace():
        end += 1
    return text[end : end + 1] == ":"


def _decode(content: bytes | str, *, code: str = "malformed_json") -> str:
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"Line {line} is not UTF-8: byte {error.start + 1} of the text."
        hint = "save it as UTF-8"
        raise MalformedDocument(message, code=code, line=line, hint=hint) from None


def _check_depth(text: str) -> None:
    """Refuse what would overflow the parser's stack, looking at brackets outside of strings."""
    depth = 0
    for match in _TOKEN.finditer(text):
        piece = match.group()
        if piece in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                reason = f"more than {MAX_DEPTH} brackets within each other"
                raise _malformed(text, match.start(), reason, code="too_deep")
        elif piece in "]}":
            depth -= 1


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = "An object of names and values is expected."
        raise InputError(message, code="not_an_object")
    for field, each in value.items():
        texts = (text for text in all_within({field: each}) if isinstance(text, str))
        if any(map(UNSTORABLE.search, texts)):
            message = "A text holds NUL or half a character, which cannot be stored."
            shown = field.encode("utf-8", "replace").decode().replace("\0", "?")[:80]
            hint = "remove it: in JSON it may be written \\u0000 or \\ud800"
            raise InputError(message, code="bad_character", field=shown, hint=hint)
    return value
