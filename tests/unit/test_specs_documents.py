"""Strict reading: what is odd is refused with its line, and YAML habits are understood."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.specs.documents import apply_overrides, read_json, read_yaml
from tuneyard.specs.errors import InputError


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ('{"a": 1', "malformed_json", 1),
        ('{"a": 1,\n}', "malformed_json", 2),
        ('{"a": 1} // no', "malformed_json", 1),
        ('{"a": 1, "a": 2}', "duplicate_key", None),
        ('{"a": NaN}', "malformed_json", None),
        ('{"a": 1e999}', "not_finite", None),
        ('{"a": "\\u0000"}', "bad_character", None),
        ('{"a": "\\ud800"}', "bad_character", None),
        ("[" * 100_000, "too_deep", None),
        ('{"a":' * 100_000, "too_deep", None),
        (b'{"a": "\xff"}', "malformed_json", 1),
        ("", "malformed_json", 1),
        ("null", "not_an_object", None),
        ("[]", "not_an_object", None),
    ],
)
def test_odd_json_is_refused(text: str | bytes, code: str, line: int | None) -> None:
    with pytest.raises(InputError) as refused:
        read_json(text)
    assert (refused.value.code, refused.value.line) == (code, line)


def test_brackets_within_strings_are_no_depth() -> None:
    assert read_json('{"a": "' + "[" * 1000 + '\\""}')["a"].startswith("[[")


def test_a_byte_order_mark_is_accepted() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert read_yaml(b"\xef\xbb\xbfa: 1") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: !!python/object/apply:os.system [x]", "unsafe_yaml"),
        ("a: [1", "bad_yaml"),
        ("a: 1\n---\nb: 2", "bad_yaml"),
        ("a: 1\na: 2", "duplicate_key"),
        ("\ta: 1", "bad_yaml"),
        ("a: .nan", "not_finite"),
        ("- a", "not_an_object"),
        ("", "not_an_object"),
        ("a: &a [1]\nb: [" + "*a, " * 200 + "]", "too_many_aliases"),
    ],
)
def test_odd_yaml_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as refused:
        read_yaml(text)
    assert refused.value.code == code


def test_yaml_numbers_are_read_as_numbers_and_norway_as_a_text() -> None:
    read = read_yaml("a: 5e-5\nb: 1e-4\nc: 1_000\nd: 1.0e3\nname: no\nf: 2024-01-01\ng: true")
    assert read == {
        "a": 5e-5,
        "b": 1e-4,
        "c": 1000,
        "d": 1000.0,
        "name": "no",
        "f": "2024-01-01",
        "g": True,
    }


def test_overrides_are_read_as_yaml_reads_them() -> None:
    changed = apply_overrides({"a": 1, "b": 2}, ["a=5e-5", "c=[1, 2]", "d=x=y"])
    assert changed == {"a": 5e-5, "b": 2, "c": [1, 2], "d": "x=y"}


@pytest.mark.parametrize("override", ["", "a", "=1"])
def test_an_override_without_key_and_value_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="is not key=value"):
        apply_overrides({}, [override])


@given(st.text())
def test_no_text_makes_reading_crash(text: str) -> None:
    for read in (read_json, read_yaml):
        try:
            assert isinstance(read(text), dict)
        except InputError:
            pass
