"""What a worker makes of a runner's files, whatever a runner wrote into them."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneyard.specs.exits import RunnerEnd
from tuneyard.workers.reading import parse_event, read_files, read_last_words


def an_event(type_: str, **fields: object) -> bytes:
    return json.dumps({"v": 1, "n": 1, "t_mono": 0.5, "type": type_, **fields}).encode() + b"\n"


def test_a_torn_last_line_is_read_the_next_time(tmp_path: Path) -> None:
    whole = an_event("metric", step=1, values={"loss": 2.0})
    torn = an_event("metric", step=2, values={"loss": 1.0})
    (tmp_path / "events.jsonl").write_bytes(whole + torn[:-5])
    first = read_files(tmp_path, events_offset=0, log_offset=0)
    assert first.metrics == [("loss", 1, 2.0)]
    (tmp_path / "events.jsonl").write_bytes(whole + torn)
    second = read_files(tmp_path, events_offset=first.events_offset, log_offset=0)
    assert second.metrics == [("loss", 2, 1.0)]


def test_unknown_types_and_lines_that_are_none_are_skipped(tmp_path: Path) -> None:
    lines = [
        an_event("of_a_later_version"),
        b"no json\n",
        b"[1]\n",
        an_event("phase", phase="loading"),
    ]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    reading = read_files(tmp_path, events_offset=0, log_offset=0)
    assert reading.phase == "loading"
    assert reading.events_offset == sum(map(len, lines))


def test_a_line_without_end_does_not_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"x" * 100_000)
    assert read_files(tmp_path, events_offset=0, log_offset=0).events_offset == 100_000


def test_files_that_are_not_there_yet_hold_nothing(tmp_path: Path) -> None:
    reading = read_files(tmp_path, events_offset=0, log_offset=0)
    assert (reading.events_offset, reading.log) == (0, b"")


def test_what_the_database_cannot_hold_is_replaced() -> None:
    event = parse_event(an_event("warning", code="c", message="a\x00b\ud800c"))
    assert event is not None
    assert event.message == "a\ufffdb?c"  # type: ignore[union-attr]


def test_the_newest_reason_of_a_failure_is_the_evidence(tmp_path: Path) -> None:
    reason = an_event("failed", cause="bug", evidence="the reason", patch={"lora_rank": 4})
    (tmp_path / "events.jsonl").write_bytes(an_event("phase", phase="loading") + reason)
    words = read_last_words(tmp_path)
    assert words.evidence(RunnerEnd(code=70)) == ("the reason", {"lora_rank": 4})


def test_a_runner_that_said_nothing_is_quoted_by_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\ntwo\x00\xff\n")
    said, patch = read_last_words(tmp_path).evidence(RunnerEnd(code=3))
    assert said.startswith("the runner ended with exit code 3")
    assert "two" in said
    assert "\x00" not in said
    assert patch is None


def test_a_signal_and_a_lost_guard_have_sentences_of_their_own(tmp_path: Path) -> None:
    words = read_last_words(tmp_path)
    assert "out of memory" in words.evidence(RunnerEnd(signal=9, oom_killed=True))[0]
    assert "without a word" in words.evidence(RunnerEnd())[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_no_bytes_make_the_reading_crash(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "events.jsonl").write_bytes(content)
    reading = read_files(tmp_path, events_offset=0, log_offset=0)
    assert reading.events_offset == content.rfind(b"\n") + 1
    read_last_words(tmp_path)
