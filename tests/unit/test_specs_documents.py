"""Strict reading: what is odd is refused with its line, and YAML habits are understood."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.specs.documents import apply_overrides, read_json, read_yaml
from tuneyard.specs.errors import InputError


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ('{"a": 1', "malformed_json", 1, 8),
        ('{"a": 1,\n}', "malformed_json", 2, 1),
        ('{"a": 1} // no', "malformed_json", 1, 10),
        ('{"a": 1,\n "b": {"c": "a"}, "a": 2}', "duplicate_key", 2, 19),
        ('{"b": [{"a": 1}, {"a": 1,\n"a": 2}]}', "duplicate_key", 2, 1),
        ('{"a": "NaN",\n "b": NaN}', "malformed_json", 2, 7),
        ('{"a": -Infinity}', "malformed_json", 1, 7),
        ('{"a": 1e999}', "malformed_json", 1, 7),
        ('{"a": ' + "1" * 5000 + "}", "malformed_json", 1, 7),
        ("[" * 100_000, "too_deep", 1, 51),
        ('{"a":' * 100_000, "too_deep", 1, 251),
        (b'{"a":\n "\xff"}', "malformed_json", 2, None),
        ('{"a": 1}'.encode("utf-16"), "malformed_json", 1, None),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_line_and_column(
    text: str | bytes, code: str, line: int, column: int | None
) -> None:
    with pytest.raises(InputError) as refused:
        read_json(text)
    error = refused.value
    assert (error.code, error.http_status) == (code, 400)
    assert (error.line, getattr(error, "column", None)) == (line, column)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not_an_object"),
        ("  \n", "not_an_object"),
        ("null", "not_an_object"),
        ("[]", "not_an_object"),
        ('"x"', "not_an_object"),
        ('{"a": "\\u0000"}', "bad_character"),
        ('{"a": {"b": ["\\ud800"]}}', "bad_character"),
        ('{"\\ud800": 1}', "bad_character"),
    ],
)
def test_json_that_holds_the_wrong_thing_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as refused:
        read_json(text)
    assert (refused.value.code, refused.value.http_status) == (code, 422)


def test_brackets_within_strings_are_no_depth() -> None:
    assert read_json('{"a": "' + "[" * 1000 + '\\""}')["a"].startswith("[[")


def test_a_byte_order_mark_is_accepted() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert read_yaml(b"\xef\xbb\xbfa: 1") == {"a": 1}


BOMB = "a0: &a0 [x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 7)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("b: 1\na: !!python/object/apply:os.system [x]", "unsafe_yaml", 2),
        ("a: !!timestamp 2020-01-01", "unsafe_yaml", 1),
        ("a: !!set {x}", "unsafe_yaml", 1),
        ("a: !own 1", "unsafe_yaml", 1),
        ("a: [1", "bad_yaml", 1),
        ("a: 1\n---\nb: 2", "bad_yaml", 2),
        ("a: 1\n\tb: 1", "bad_yaml", 2),
        ("? [a, b]\n: c", "bad_yaml", 1),
        ("a: &x {b: 1}\nc:\n  <<: *x", "bad_yaml", 3),
        ("a: " + "1" * 5000, "bad_yaml", 1),
        ("a: !!int x", "bad_yaml", 1),
        ("a: *nowhere", "bad_yaml", 1),
        (b"a: 1\nb: \xff", "bad_yaml", 2),
        ("a: 1\nb: 3\na: 2", "duplicate_key", 3),
        ("a: 1\nb: .nan", "not_finite", 2),
        ("a: -.inf", "not_finite", 1),
        ("a: 1e999", "not_finite", 1),
        ("a: b\nc: \x07", "bad_character", 2),
        ('a: "\\ud800"', "bad_character", None),
        ("- a", "not_an_object", None),
        ("", "not_an_object", None),
        ("a: &a [1]\nb: [" + "*a, " * 200 + "]", "too_many_aliases", 2),
        (BOMB, "too_many_aliases", 1),
        ("a: &a [*a]", "too_many_aliases", 1),
        ("a: " + "[" * 10_000, "too_deep", 1),
    ],
)
def test_odd_yaml_is_refused_with_its_line(text: str | bytes, code: str, line: int | None) -> None:
    with pytest.raises(InputError) as refused:
        read_yaml(text)
    assert (refused.value.code, refused.value.line) == (code, line), refused.value.message


def test_yaml_numbers_are_read_as_llama_factory_reads_them() -> None:
    read = read_yaml("a: 5e-5\nb: 1e-4\nc: 1_000\nd: 1.0e3\ne: .5\nf: -3\ng: 0x10\nh: true\ni: ~")
    assert list(read.values()) == [5e-5, 1e-4, 1000, 1000.0, 0.5, -3, 16, True, None]


def test_what_only_looks_like_a_number_or_a_date_stays_a_text() -> None:
    read = read_yaml("a: 010\nb: 1:30\nc: 2024-01-01\nd: yes\ne: 0x_\nf: '5'\ng: !!str 5\nh: =")
    assert list(read.values()) == ["010", "1:30", "2024-01-01", "yes", "0x_", "5", "5", "="]


def test_norway_and_numbers_stay_texts_where_a_text_is_wanted() -> None:
    read = read_yaml(
        "name: no\neval_strategy: no\nmodel_name_or_path: 08\nstop: [1.0, true]\n"
        "metadata: {run: 12}\ntemplate:\nlora_rank: 8"
    )
    assert read == {
        "name": "no",
        "eval_strategy": "no",
        "model_name_or_path": "08",
        "stop": ["1.0", "true"],
        "metadata": {"run": "12"},
        "template": None,
        "lora_rank": 8,
    }


def test_overrides_are_read_as_yaml_reads_them_and_texts_as_they_are() -> None:
    asked = ["a=5e-5", "c=[1, 2]", "d=x=y", "name=no: way", "stop=[a, b]", "template=", "bf16=yes"]
    asked += ["default_system=null", "eval_dataset=~"]
    assert apply_overrides({"a": 1, "b": 2}, asked) == {
        "a": 5e-5,
        "b": 2,
        "c": [1, 2],
        "d": "x=y",
        "name": "no: way",
        "stop": ["a", "b"],
        "template": None,
        "bf16": "yes",
        "default_system": None,
        "eval_dataset": None,
    }


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("", "bad_override"),
        ("a", "bad_override"),
        ("=1", "bad_override"),
        ("a=1\nb: 2", "bad_override"),
        ("a=[1", "bad_yaml"),
        ("a=.nan", "not_finite"),
        ("a=!!python/none x", "unsafe_yaml"),
        ("name=\x00", "bad_character"),
    ],
)
def test_an_override_that_is_no_key_and_value_is_refused(override: str, code: str) -> None:
    with pytest.raises(InputError) as refused:
        apply_overrides({}, [override])
    assert refused.value.code == code


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "' + '\\"' * 500_000,
        "[" * 1_000_000,
        '{"a": [' + '"x",' * 300_000,
        "a: " + "[" * 10**5,
    ],
    ids=["quotes", "brackets", "strings", "yaml"],
)
def test_a_megabyte_built_to_be_slow_is_refused_within_a_second(text: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError):
        (read_yaml if text.startswith("a:") else read_json)(text)
    assert time.process_time() - begun < 1


@given(st.text() | st.text("[]{}&*:,-!?|>'\"%@ \n\ta1.e~", max_size=40))
def test_no_text_makes_reading_crash(text: str) -> None:
    for read in (read_json, read_yaml):
        try:
            assert isinstance(read(text), dict)
        except InputError:
            pass


def test_a_character_that_cannot_be_stored_is_refused_with_the_mend() -> None:
    with pytest.raises(InputError) as refused:
        read_json('{"name": "a\\u0000"}')
    assert (refused.value.code, bool(refused.value.hint)) == ("bad_character", True)
