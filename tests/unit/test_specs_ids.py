"""Ids: ordered by time, exact in form."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.specs.errors import BadId
from tuneyard.specs.ids import PREFIXES, is_id, new_id, parse_id, show_id


def test_ids_are_version_7_and_rise_with_time() -> None:
    first = new_id()
    start = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 == start:
        pass
    second = new_id()
    assert first.version == second.version == 7
    assert first.variant == second.variant
    assert first < second


@pytest.mark.parametrize("kind", PREFIXES)
def test_an_id_is_read_back_as_it_was_shown(kind: str) -> None:
    value = new_id()
    assert parse_id(kind, show_id(kind, value)) == value


@pytest.mark.parametrize(
    "text",
    ["", "job_", "job_xyz", "job", "JOB_" + "0" * 32, "job_" + "A" * 32, "file_" + "0" * 32,
     "job_" + "0" * 31, "job_" + "0" * 33, "job_" + "0" * 32 + "\n", "' OR 1=1--", "job_" * 5000],
)  # fmt: skip
def test_nothing_but_the_exact_form_is_an_id(text: str) -> None:
    assert not is_id("job", text)
    with pytest.raises(BadId):
        parse_id("job", text)


@given(st.text())
def test_no_text_makes_parsing_crash(text: str) -> None:
    assert is_id("job", text) in (True, False)
