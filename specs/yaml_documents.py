"""YAML as people write job files: safe types alone, and no text that turns into something else.

PyYAML parses; what a scalar means is decided here, because YAML 1.1 reads ``no`` as false, ``010``
as 8, ``1:30`` as 90 and ``5e-5`` as a text. Here 5e-5 and 1_000 are numbers;
yes, no, on and off stay texts, which a flag understands and a name keeps.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import yaml

from tuneyard.specs.errors import InputError

MAX_DEPTH = 50
MAX_ALIASES = 100
MAX_VALUES = 200_000
"""Values after all aliases are followed."""

MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NULL = frozenset({"", "~", "null", "Null", "NULL"})


def read_yaml_text(text: str, *, texts: Collection[str] = ()) -> Any:
    """The one document's value; below the names in ``texts`` plain scalars stay as written.

    Raises: InputError bad_yaml, unsafe_yaml, duplicate_key, too_deep, too_many_aliases, not_finite.
    """
    try:
        node = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _bad(error.problem or "it cannot be read", error.problem_mark) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"Line {line}: character U+{error.character:04X} is not allowed in YAML."
        raise InputError(message, code="bad_character", line=line) from None
    if node is None:
        return None
    return _Values(frozenset(texts)).document(node)


def _bad(
    problem: str, mark: Any, *, code: str = "bad_yaml", field: str | None = None
) -> InputError:
    line = mark.line + 1 if mark else None
    where = f"Line {line}, column {mark.column + 1}" if mark else "YAML"
    hint = "use spaces, not tabs" if r"'\t'" in problem else None
    return InputError(f"{where}: {problem}.", code=code, line=line, field=field, hint=hint)


class _Composer(yaml.SafeLoader):
    """Nodes of one document; depth and aliases are bounded while they are composed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.events.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                problem = f"more than {MAX_ALIASES} aliases"
                raise _bad(problem, mark, code="too_many_aliases")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _bad(f"more than {MAX_DEPTH} levels", mark, code="too_deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_scalar_node(self, anchor: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_scalar_node(anchor)
        if not event.implicit[0]:
            node.style = node.style or "tagged"
        return node


_Composer.yaml_implicit_resolvers = {}


class _Values:
    """From nodes to values. Aliases are followed anew each time, so what they unfold to counts."""

    def __init__(self, texts: frozenset[str]) -> None:
        self._texts = texts
        self._left = MAX_VALUES

    def document(self, node: yaml.Node) -> Any:
        """The value of the whole document."""
        return self._value(node, depth=0, field=None)

    def _value(self, node: yaml.Node, *, depth: int, field: str | None) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            problem = "its aliases unfold to too much"
            raise _bad(problem, node.start_mark, code="too_many_aliases")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, depth=depth, field=field)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self._value(each, depth=depth + 1, field=field) for each in node.value]
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, field, as_text=field in self._texts)
        raise _bad(f"the tag {node.tag} is not allowed", node.start_mark, code="unsafe_yaml")

    def _mapping(self, node: yaml.MappingNode, *, depth: int, field: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise _bad("a name must be a plain text", key.start_mark)
            if key.value in found:
                problem = f"{key.value[:80]!r} is given twice"
                raise _bad(problem, key.start_mark, code="duplicate_key", field=key.value[:80])
            below = key.value if depth == 0 else field
            found[key.value] = self._value(value, depth=depth + 1, field=below)
        return found


def _scalar(node: yaml.ScalarNode, field: str | None, *, as_text: bool) -> Any:
    text = node.value
    if node.style is None:  # plain, without a tag
        kind = "str" if as_text and text not in NULL else _kind(text)
    else:
        kind = node.tag.removeprefix(_TAG)
    if kind not in _READ:
        raise _bad(f"the tag {node.tag} is not allowed", node.start_mark, code="unsafe_yaml")
    try:
        value = _READ[kind](text)
    except (ValueError, KeyError):
        raise _bad(f"{text[:40]!r} is no {kind}", node.start_mark, field=field) from None
    if isinstance(value, float) and not math.isfinite(value):
        problem = "numbers must be finite"
        raise _bad(problem, node.start_mark, code="not_finite", field=field)
    return value


def _kind(text: str) -> str:
    if text in NULL:
        return "null"
    if text in _BOOL:
        return "bool"
    if _INT.fullmatch(text):
        return "int"
    return "float" if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text) else "str"


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("too long")
    digits = text.replace("_", "")
    return int(digits, 16 if "x" in digits else 10)


def _number(text: str) -> float:
    if _NOT_FINITE.fullmatch(text):
        return math.inf
    return float(text.replace("_", ""))


_READ: Mapping[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": _BOOL.__getitem__,
    "int": _whole,
    "float": _number,
    "str": str,
}
