"""Reading JSON and YAML strictly: what is odd is refused with its line, nothing is guessed."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from tuneyard.specs.errors import InputError

MAX_DEPTH = 50
MAX_ALIASES = 100

_SURROGATE = re.compile("[\ud800-\udfff\x00]")


def read_json(content: bytes | str) -> dict[str, Any]:
    """Read one JSON object. Raises: InputError with code, line and column."""
    text = _decode(content)
    _check_depth(text)
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"The JSON breaks off at line {error.lineno}, column {error.colno}: {error.msg}."
        raise InputError(message, code="malformed_json", line=error.lineno) from None
    return _checked(value)


def read_yaml(content: bytes | str) -> dict[str, Any]:
    """Read one YAML document of names and values. Raises: InputError with code and line."""
    text = _decode(content)
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
        if len(nodes) > 1:
            line = nodes[1].start_mark.line + 1
            raise InputError("Two documents in one file.", code="bad_yaml", line=line)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(f"{error.problem}.", code="unsafe_yaml", line=line) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(
            f"The YAML cannot be read: {error.problem}.", code="bad_yaml", line=line
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"The YAML cannot be read: {error}.", code="bad_yaml") from None
    except RecursionError:
        raise InputError("The YAML is nested too deeply.", code="too_deep") from None
    return _checked(value)


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set ``key=value`` pairs; the value is read as YAML reads one. Raises: InputError."""
    changed = dict(document)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            hint = "for example --set lora_rank=16"
            raise InputError(f"{override!r} is not key=value.", code="bad_override", hint=hint)
        changed |= read_yaml(f"{name.strip()}: {text}")
    return changed


class _Loader(yaml.SafeLoader):
    """YAML's safe types, numbers such as 5e-5, duplicate keys refused, aliases counted."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise InputError("Too many YAML aliases.", code="too_many_aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(
                    f"{key.value} is given twice.",
                    code="duplicate_key",
                    field=str(key.value),
                    line=line,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][+-]?\d+$"),
    list("+-.0123456789"),
)

# yes, no, on and off stay texts: a flag reads them as such, and a name may be "no" (Norway).
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _decode(content: bytes | str) -> str:
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        message = f"Line {line} is not UTF-8 (byte {error.start})."
        raise InputError(message, code="malformed_json", line=line) from None


def _check_depth(text: str) -> None:
    """Refuse what would overflow the parser's stack, looking at brackets outside of strings."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
        bracket = match.group()
        if bracket in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InputError("The JSON is nested too deeply.", code="too_deep")
        elif bracket in "]}":
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{name!r} is given twice.", code="duplicate_key", field=name)
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise InputError(f"{name} is not JSON.", code="malformed_json")


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = "An object of names and values is expected."
        raise InputError(message, code="not_an_object")
    _check_leaves(value)
    return value


def _check_leaves(value: Any, field: str | None = None) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_leaves(name, field)
            _check_leaves(inner, field or str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_leaves(inner, field)
    elif isinstance(value, str) and _SURROGATE.search(value):
        message = "A text holds NUL or half a character, which cannot be stored."
        raise InputError(message, code="bad_character", field=field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError("Numbers must be finite.", code="not_finite", field=field)
