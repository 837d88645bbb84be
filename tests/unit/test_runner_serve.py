"""Answering by a kept model: pieces, order, refusals, ends. Tiny model, fp32, CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.attempts_by_hand import read_events, run_here, write_spec
from support.sockets import Asking, ask, connected, text_of
from support.tiny_models import a_tiny_base
from support.yards import wait_for

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.deltas import Deltas, first_stop
from tuneyard.runners.desk import Busy, Desk, Ended, Question
from tuneyard.runners.devices import Device
from tuneyard.runners.events import EventLog
from tuneyard.runners.failures import Stopped
from tuneyard.runners.infer import infer
from tuneyard.runners.serve import serve
from tuneyard.runners.stops import Stops
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.runner import RunnerSpec

CHINESE = "今天天气怎么样, 我们去公园吧。🙂👩\u200d👩\u200d👧\u200d👦é"
LONG = {"max_new_tokens": 400, "temperature": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@dataclass
class Served:
    """A runner in a thread, and how it ended."""

    workdir: Path
    stops: Stops
    thread: threading.Thread
    ended: list[object]

    def end(self) -> object:
        """Wait for its end: None, or what it raised."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.ended[0]

    def of_type(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.workdir) if event["type"] == type_]


@contextmanager
def serving(folder: Path, base: Path, **arguments: Any) -> Iterator[Served]:
    """A runner that is ready."""
    _, workdir = write_spec(folder, kind="serve")
    spec = RunnerSpec(
        kind="serve",
        inputs={"model": str(base)},
        arguments={"temperature": 0, "max_new_tokens": 24} | arguments,
    )
    stops, ended = Stops(), []
    attempt = Attempt(spec, workdir, EventLog(workdir), stops, Device("cpu"))

    def run() -> None:
        try:
            serve(attempt)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    served = Served(workdir, stops, thread, ended)
    thread.start()
    wait_for(
        lambda: ended or any(e.get("phase") == "running" for e in served.of_type("phase")),
        within_s=30,
        what="a runner that is ready",
    )
    try:
        yield served
    finally:
        stops.stop_asked = True
        thread.join(20)


@pytest.fixture
def served(tmp_path: Path, base: Path) -> Iterator[Served]:
    with serving(tmp_path, base) as running:
        yield running


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")),
    stops=st.lists(st.text(min_size=1, max_size=4), max_size=3),
)
def test_joined_pieces_of_bytes_are_the_text_to_its_first_stop(text: str, stops: list[str]) -> None:
    deltas, pieces, raw = Deltas(stops), [], text.encode()
    for end in range(1, len(raw) + 1):
        so_far = raw[:end].decode("utf-8", "replace")
        pieces.append(deltas.more(so_far))
        if first_stop(so_far, stops) is not None:
            break
    whole = text[: first_stop(text, stops)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + deltas.rest(whole) == whole


def test_a_piece_never_holds_half_a_character() -> None:
    deltas, raw = Deltas(), CHINESE.encode()
    pieces = [deltas.more(raw[:end].decode("utf-8", "replace")) for end in range(1, len(raw) + 1)]
    assert [piece for piece in pieces if piece] == list(CHINESE)


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_clear() -> None:
    deltas = Deltas(["END."])
    assert [deltas.more(text) for text in ("a E", "a EN", "a END", "a ENDE", "a ENDEND")] == [
        "a ", "", "", "END", "",
    ]  # fmt: skip
    assert deltas.rest("a END") == ""


def test_an_answer_in_pieces_is_the_answer_of_an_inference_job(
    served: Served, base: Path, tmp_path: Path
) -> None:
    questions = ["Who?", CHINESE, "What is it that you do all day long?"]
    ran = run_here(
        tmp_path,
        infer,
        inputs={"model": base},
        arguments={"prompts": questions, "temperature": 0, "max_new_tokens": 24},
    )
    for question, row in zip(questions, ran.results, strict=True):
        pieces = list(ask(served.workdir, question).pieces())
        assert text_of(pieces) == row["text"]
        assert pieces[-1]["finish_reason"] == row["finish_reason"]
        usage = {name: row[name] for name in ("prompt_tokens", "completion_tokens")}
        assert pieces[-1]["usage"] == usage


def test_a_stop_string_across_tokens_ends_an_answer_and_no_piece_holds_its_beginning(
    served: Served,
) -> None:
    whole = text_of(list(ask(served.workdir, max_new_tokens=60).pieces()))
    stop = whole[20:25]
    pieces = list(ask(served.workdir, max_new_tokens=60, stop=[stop, "never there"]).pieces())
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1]["finish_reason"] == "stop"
    assert pieces[-1]["usage"]["completion_tokens"] < 60


def test_a_question_may_say_otherwise_than_the_job(served: Served) -> None:
    plain = list(ask(served.workdir).pieces())[-1]
    drawn = list(ask(served.workdir, temperature=1.5, seed=3, max_new_tokens=4).pieces())
    again = list(ask(served.workdir, temperature=1.5, seed=3, max_new_tokens=4).pieces())
    assert (plain["settings"]["temperature"], plain["settings"]["max_new_tokens"]) == (0, 24)
    assert drawn[-1]["settings"]["temperature"] == 1.5
    assert text_of(drawn) == text_of(again)
    assert drawn[-1]["usage"]["completion_tokens"] <= 4


def test_without_a_seed_each_answer_is_drawn_anew(served: Served) -> None:
    asked = {"temperature": 2.0, "max_new_tokens": 30}
    seeds = {list(ask(served.workdir, **asked).pieces())[-1]["settings"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_the_default_system_text_leads_conversations_that_have_none(
    tmp_path: Path, base: Path
) -> None:
    with serving(tmp_path, base, default_system="Be brief.") as served:
        led = list(ask(served.workdir).pieces())
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
        ]
        said = list(Asking(served.workdir, "/chat", {"messages": messages}).pieces())
        own = [{"role": "system", "content": "Be brief. Now."}, messages[1]]
        other = list(Asking(served.workdir, "/chat", {"messages": own}).pieces())
    assert text_of(led) == text_of(said)
    assert led[-1]["usage"] == said[-1]["usage"]
    assert other[-1]["usage"]["prompt_tokens"] == led[-1]["usage"]["prompt_tokens"] + 5


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 422, "context_too_long", "512"),
        ({"messages": []}, 422, "wrong_type", "messages"),
        ({"messages": [{"role": "user"}]}, 422, "wrong_type", "messages[0].content"),
        ({}, 422, "wrong_type", "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}], "top_p": 7},
            422,
            "bad_spec",
            "out of range",
        ),
        (b"[1]", 422, "malformed_json", "object"),
    ],
)
def test_a_bad_question_is_refused_with_a_sentence_and_others_are_answered(
    served: Served, body: Any, status: int, code: str, said: str
) -> None:
    refused = Asking(served.workdir, "/chat", body)
    (answer,) = refused.pieces()
    assert (refused.status, answer["error"]["code"]) == (status, code)
    assert said in answer["error"]["message"]
    assert "done" in list(ask(served.workdir).pieces())[-1]


def test_an_answer_stops_soon_after_who_asked_has_hung_up(served: Served) -> None:
    first = ask(served.workdir, **LONG)
    next(first.pieces())
    first.hang_up()
    last = list(ask(served.workdir).pieces())[-1]
    assert last["done"]
    (metric,) = served.of_type("metric")
    assert metric["values"]["completion_tokens"] == last["usage"]["completion_tokens"]


def test_questions_are_answered_in_the_order_in_which_they_came(served: Served) -> None:
    first = ask(served.workdir, **LONG)
    pieces = first.pieces()
    next(pieces)
    second = ask(served.workdir).pieces()
    assert next(second) == {"waiting": 1}
    first.hang_up()
    assert list(second)[-1]["done"]


def test_sigterm_tells_who_waits_and_ends_with_76(served: Served) -> None:
    first = ask(served.workdir, **LONG)
    pieces = first.pieces()
    next(pieces)
    second = ask(served.workdir)
    served.stops.stop_asked = True
    ended = served.end()
    assert isinstance(ended, Stopped)
    assert ended.exit_code == ExitCode.STOPPED_WITHOUT
    for each in (list(pieces), list(second.pieces())):
        assert each[-1]["error"]["code"] == "stopping"


def test_a_drain_answers_what_waits_and_takes_nothing_more(served: Served) -> None:
    first = ask(served.workdir, **LONG)
    pieces = first.pieces()
    next(pieces)
    second = ask(served.workdir)
    for asking, status in ((Asking(served.workdir, "/drain", {}), 202), (ask(served.workdir), 410)):
        assert asking.status == status
        asking.hang_up()
    assert list(pieces)[-1]["done"]
    assert list(second.pieces())[-1]["done"]
    assert served.end() is None
    assert served.of_type("result")[0]["values"]["ended_by"] == "drained"


def test_a_drain_is_answered_once_its_body_has_been_read(served: Served) -> None:
    with connected(served.workdir) as slow:
        slow.sendall(b"POST /drain HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        slow.settimeout(0.3)
        with pytest.raises(TimeoutError):
            slow.recv(1)
        slow.settimeout(10)
        slow.sendall(b"{}")
        assert slow.recv(100).startswith(b"HTTP/1.1 202 ")
    assert served.end() is None


def test_it_ends_when_nobody_asks_any_more(tmp_path: Path, base: Path) -> None:
    with serving(tmp_path, base, idle_s=0.5) as served:
        assert list(ask(served.workdir).pieces())[-1]["done"]
        assert served.end() is None
    result = served.of_type("result")[0]["values"]
    assert (result["ended_by"], result["answers"]) == ("idle", 1)
    assert [e["done"] for e in served.of_type("progress")][-1] == 1


def test_a_runner_that_waits_or_answers_for_long_is_seen_to_live(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.runners.serve.HEARTBEAT_EVERY_S", 0.05)

    def beats() -> int:
        return len(served.of_type("progress"))

    wait_for(lambda: beats() >= 3, within_s=10, what="a sign of life while it waits")
    asking = ask(served.workdir, **LONG)
    next(asking.pieces())
    before = beats()
    wait_for(lambda: beats() > before, within_s=10, what="a sign of life while it answers")
    asking.hang_up()


def test_the_socket_is_for_its_owner_alone_and_its_path_may_be_long(
    tmp_path: Path, base: Path
) -> None:
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    with serving(folder, base) as served:
        assert (served.workdir / "serve.sock").stat().st_mode & 0o777 == 0o600
        assert list(ask(served.workdir).pieces())[-1]["done"]


def a_question() -> Question:
    return Question([1], None)  # type: ignore[arg-type]


def test_a_desk_that_is_full_says_so_and_forgets_who_has_left() -> None:
    desk = Desk(room=2)
    waiting = [a_question() for _ in range(3)]
    assert [desk.put(each) for each in waiting] == [0, 1, 2]
    with pytest.raises(Busy, match="3 questions wait already"):
        desk.put(a_question())
    waiting[1].gone.set()
    assert desk.put(a_question()) == 2
    assert desk.take(within_s=0) is waiting[0]
    assert desk.take(within_s=0) is waiting[2]


def test_no_question_slips_in_while_a_desk_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    desk.put(a_question())
    assert not desk.close_if_idle(0)
    assert desk.take(within_s=0) is not None
    assert desk.take(within_s=0) is None
    assert desk.close_if_idle(0)
    with pytest.raises(Ended):
        desk.put(a_question())


def test_an_error_of_one_question_is_told_and_the_next_is_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse: list[Callable[..., Any]] = []

    def fail(self: Any, *_: Any) -> None:
        if refuse:
            refuse.pop()
            raise MemoryError("out of memory")

    monkeypatch.setattr("tuneyard.runners.generation.Speaker._room", _first(fail))
    refuse.append(fail)
    pieces = list(ask(served.workdir).pieces())
    assert pieces[-1]["error"]["code"] == "out_of_memory"
    assert "shorten" in pieces[-1]["error"]["hint"]
    assert list(ask(served.workdir).pieces())[-1]["done"]


def _first(do: Callable[..., Any]) -> Callable[..., Any]:
    """The real method, after ``do``."""
    from tuneyard.runners.generation import Speaker

    real = Speaker._room

    def both(self: Any, longest: int) -> int:
        do(self)
        return real(self, longest)

    return both
