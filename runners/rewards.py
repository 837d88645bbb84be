"""What an answer is worth, by the functions of specs/rewards.py. Pure: a text in, a number out.

Nothing of a user's is run, and each function takes time linear in the answer.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneyard.runners.failures import BadData
from tuneyard.specs.rewards import (
    ANSWER,
    Contains,
    ExactMatch,
    JsonValid,
    Length,
    NumericEquality,
    Regex,
    RewardFunc,
    Tags,
    pattern_of,
)


@dataclass(frozen=True)
class Answered:
    """An answer without the end of its turn, and the columns of the row that asked for it."""

    text: str
    tokens: int
    columns: Mapping[str, Any]


Score = Callable[[Answered], float]


def score_of(asked: RewardFunc) -> Score:
    """The function that an entry of reward_funcs means."""
    return _SCORES[type(asked)](asked)


def names_of(functions: Sequence[RewardFunc]) -> list[str]:
    """A name for the metrics of each; what comes twice is numbered.

    >>> names_of([ExactMatch(), Tags(), ExactMatch()])
    ['exact_match', 'format', 'exact_match_2']
    """
    names = [each.name for each in functions]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if n == 1 else f"{name}_{n}" for name, n in zip(names, counts, strict=True)]


def check_columns(
    functions: Sequence[RewardFunc], rows: Sequence[Mapping[str, Any]], lines: Sequence[int]
) -> None:
    """Every row has what the functions read. Raises: BadData with the line."""
    for each in functions:
        column = each.needs
        for row, line in zip(rows, lines, strict=True):
            if column is not None and column not in row:
                raise BadData(
                    f"{each.name} reads the column {column!r}, which this row has not.",
                    line=line,
                    field=column,
                    hint=f"its columns are: {', '.join(row) or 'none'}",
                )
            if isinstance(each, NumericEquality) and last_number(_text(row[each.column])) is None:
                message = f"numeric_equality: {str(row[each.column])[:60]!r} holds no number."
                raise BadData(message, line=line, field=column, hint="such as 42 or #### 1,250")


def _exact_match(asked: ExactMatch) -> Score:
    def score(answered: Answered) -> float:
        said = _looked_at(answered.text, asked.tag)
        wanted = _text(answered.columns[asked.column]).strip()
        return float(said is not None and _same(said.strip(), wanted, asked.ignore_case))

    return score


def _same(said: str, wanted: str, ignore_case: bool) -> bool:
    return said.casefold() == wanted.casefold() if ignore_case else said == wanted


def _contains(asked: Contains) -> Score:
    def score(answered: Answered) -> float:
        said = _looked_at(answered.text, asked.tag)
        wanted = asked.text
        if wanted is None:
            wanted = _text(answered.columns[asked.column or ANSWER]).strip()
        if said is None or not wanted:
            return 0.0
        if asked.ignore_case:
            said, wanted = said.casefold(), wanted.casefold()
        return float(wanted in said)

    return score


def _regex(asked: Regex) -> Score:
    pattern = pattern_of(asked.pattern)

    def score(answered: Answered) -> float:
        said = _looked_at(answered.text, asked.tag)
        return float(said is not None and pattern.isinstance_python(said))

    return score


def _numeric_equality(asked: NumericEquality) -> Score:
    def score(answered: Answered) -> float:
        said = _looked_at(answered.text, asked.tag)
        found = None if said is None else last_number(said)
        wanted = last_number(_text(answered.columns[asked.column]))
        if found is None or wanted is None:
            return 0.0
        return float(abs(found - wanted) <= asked.tolerance)

    return score


_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


def last_number(text: str) -> float | None:
    """The last number of a text, thousands with commas or not.

    >>> last_number("3 + 4 = 7."), last_number("#### 1,250"), last_number("none")
    (7.0, 1250.0, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _json_valid(asked: JsonValid) -> Score:
    def score(answered: Answered) -> float:
        said = _looked_at(answered.text, asked.tag)
        try:
            value = json.loads(said or "", parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        if asked.keys is None:
            return 1.0
        return float(isinstance(value, dict) and all(key in value for key in asked.keys))

    return score


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _length(asked: Length) -> Score:
    count: Callable[[Answered], int] = {
        "tokens": lambda answered: answered.tokens,
        "words": lambda answered: len(answered.text.split()),
        "characters": lambda answered: len(answered.text),
    }[asked.unit]
    width = asked.within or asked.target
    return lambda answered: max(0.0, 1.0 - abs(count(answered) - asked.target) / width)


def _tags(asked: Tags) -> Score:
    def score(answered: Answered) -> float:
        rest = answered.text
        for tag in asked.tags:
            before, opened, rest = rest.partition(f"<{tag}>")
            inner, closed, rest = rest.partition(f"</{tag}>")
            others = (f"<{each}>" in inner or f"</{each}>" in inner for each in asked.tags)
            if before.strip() or not opened or not closed or any(others):
                return 0.0
        return float(not rest.strip())

    return score


def _looked_at(text: str, tag: str | None) -> str | None:
    """All of an answer, or what its last <tag>…</tag> holds; None where there is none."""
    if tag is None:
        return text
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inner = before.rpartition(f"<{tag}>")
    return inner if closed and opened else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_SCORES: Mapping[type, Callable[[Any], Score]] = {
    ExactMatch: _exact_match,
    Contains: _contains,
    Regex: _regex,
    NumericEquality: _numeric_equality,
    JsonValid: _json_valid,
    Length: _length,
    Tags: _tags,
}
