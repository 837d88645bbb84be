"""pydantic's findings in our words: field, reason, range, mend."""

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from tuneyard.specs.errors import InputError
from tuneyard.specs.wording import range_words, type_words

SHOWN = 60
HINTED = 20
"""So many unknown names get the nearest real one; more of them are no slip of the pen."""


def problem(code: str, message: str, field: str, hint: str | None = None) -> InputError:
    """An error about one field."""
    return InputError(message, code=code, field=field, hint=hint)


def exclude(a: str, b: str) -> InputError:
    """An error about two fields of which one at most may be said."""
    return problem("conflicting_fields", f"{a} and {b} exclude each other.", a, "give one of them")


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as YAML has them too
    text = value[: SHOWN + 1] if isinstance(value, str) else value
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a number of very many digits"
    quoted = repr(text)
    return quoted if len(quoted) <= SHOWN else f"{quoted[:SHOWN]}…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The likeliest of the real names, or None."""
    simple = "".join(c if c.isalnum() else "_" for c in name[:80].lower())
    near = difflib.get_close_matches(simple, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def problems_of(error: ValidationError, model: type[BaseModel]) -> Iterator[InputError]:
    """One problem for each place that is wrong."""
    seen = set()
    for found in error.errors(include_url=False):
        field = _field(found["loc"])
        if field not in seen:
            seen.add(field)
            yield _problem(field, found, model)


def _field(location: tuple[int | str, ...]) -> str:
    """``prompts[3]``, ``metadata.a``; names in <> are ours for the members of a union."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (part.startswith("<") or part == "[key]"):
            text += f".{part[:SHOWN]}" if text else part
    return text


def _problem(field: str, found: Any, model: type[BaseModel]) -> InputError:
    top = model.model_fields.get(str(found["loc"][0]))
    kind, context, value = found["type"], found.get("ctx", {}), found.get("input")
    said = f"{field} = {shown(value)}"
    if "text" in context and "hint" in context:
        return problem(kind, f"{said} {context['text']}.", field, context["hint"])
    hint = top.description if top else None
    if kind == "missing":
        return problem("missing_field", f"{field} is missing.", field, hint)
    if kind == "extra_forbidden":
        return problem("unknown_field", f"There is no field {field}.", field, None)
    if kind == "literal_error":
        near = nearest(str(value), [str(each) for each in _choices(context)])
        hint = f"did you mean {near}?" if near else hint
        if near is not None and near == value:
            hint = f"write {near} without quotes"
        message = f"{said} is no choice: {context.get('expected')}."
        return problem("bad_choice", message, field, hint)
    if kind.startswith(("string_too", "too_")):
        return problem("out_of_range", f"{field} is {_length(context)}.", field, hint)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind.startswith(("greater_than", "less_than")) or (kind == "float_type" and whole):
        range_ = range_words(top) if top and field in model.model_fields else _bound(context)
        return problem("out_of_range", f"{said} is out of range: {range_}.", field, hint)
    words = type_words(top) if top and field in model.model_fields else TYPES.get(kind, "")
    return problem("wrong_type", f"{said} is of the wrong type.", field, _typed(value, words))


TYPES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
}
"""pydantic's finding -> what was expected."""


def _length(context: Any) -> str:
    if "max_length" in context:
        return f"too long: at most {context['max_length']:,}"
    return f"too short: at least {context['min_length']:,}"


def _bound(context: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " ".join(f"{words[name]} {bound}" for name, bound in context.items() if name in words)


def _typed(value: Any, words: str) -> str | None:
    """What is expected, and how the value would be written."""
    if isinstance(value, float) and value == int(value) and "whole" in words:
        return f"{words}: write {int(value)}"
    if isinstance(value, str) and "number" in words:
        return f"{words}, without quotes or spaces"
    return f"{words} is expected" if words else None


def _choices(context: Any) -> list[str]:
    text = str(context.get("expected", ""))
    return [part.strip().strip("'") for part in text.replace(" or ", ", ").split(",")]
