"""A field's type and range in words, for errors and for the reference page."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo


class FieldRow(NamedTuple):
    """A line of the reference: all texts."""

    kind: str
    name: str
    type: str
    default: str
    range: str
    sentence: str


def field_rows(kind: str, model: type[BaseModel]) -> list[FieldRow]:
    """Every field of a kind, in the order of its class."""
    return [
        FieldRow(
            kind,
            name,
            type_words(field),
            "required" if field.is_required() else _default(field),
            range_words(field),
            field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == {}:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def type_words(field: FieldInfo) -> str:
    """For example ``a text or a list``."""
    found = dict.fromkeys(
        f"one of {', '.join(map(str, get_args(each)))}"
        if get_origin(each) is Literal
        else WORDS.get(get_origin(each) or each, "an object")
        for each in leaves(field.annotation)
    )
    return " or ".join(found)


def range_words(field: FieldInfo) -> str:
    """For example ``1 to 1024``; empty where there is no range."""
    low = high = ""
    for bound in _bounds(field):
        match bound:
            case at.Ge():
                low = _number(bound.ge)
            case at.Gt():
                low = f"above {_number(bound.gt)}"
            case at.Le():
                high = _number(bound.le)
            case at.Lt():
                high = f"below {_number(bound.lt)}"
    if low and high:
        return f"{low} {'and ' if 'below' in high else 'to '}{high}"
    return f"{low} or more" if low else high


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def leaves(annotation: Any) -> Iterator[Any]:
    """The types within unions and Annotated; None is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from leaves(each)
    elif annotation is not type(None):
        yield annotation


def _bounds(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    yield from _bounds_within(field.annotation)


def _bounds_within(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        for each in metadata:
            if isinstance(each, FieldInfo):
                yield from each.metadata
            elif not isinstance(each, Tag):
                yield each
        yield from _bounds_within(inner)
    elif origin in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _bounds_within(each)
