"""Following a job over HTTP: its timeline, metrics and log, so far and as they grow."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
from support.apis import ASK, Api, serve

from tuneyard.models.attempts import AttemptRef

SSE = {"Accept": "text/event-stream"}
DEADLINE_S = 20


class Running:
    """A running job, its attempt, and a client of its team."""

    def __init__(self, api: Api, http: httpx.Client, node: UUID) -> None:
        self.api, self.http, self.node = api, http, node
        self.job: str = http.post("/jobs", json=ASK).json()["id"]
        self.ref: AttemptRef = api.start(self.job, node)

    @property
    def path(self) -> str:
        return f"/jobs/{self.job}"

    def log(self, **params: Any) -> str:
        return self.http.get(f"{self.path}/logs", params=params).text

    def again(self) -> None:
        """Lose the attempt and start the next."""
        self.api.lose(self.ref)
        self.ref = self.api.start(self.job, self.node)


@pytest.fixture
def running(api: Api, a_node: Callable[..., UUID]) -> Iterator[Running]:
    api.a_base()
    with api.client() as http:
        yield Running(api, http, a_node(gpus=0))


def test_a_job_that_is_queued_again_shows_nothing_of_its_last_attempt(running: Running) -> None:
    reached = {"done": 270, "total": 272, "unit": "tensors"}
    running.api.ship(running.ref, phase="publishing", progress=reached)
    assert running.http.get(running.path).json()["progress"]["done"] == 270
    running.api.lose(running.ref)
    assert running.http.get(running.path).json()["progress"] is None
    events = Follower(running.http, f"{running.path}/events", headers=SSE)
    live = next(e for e in iter(events.event, None) if e["event"] == "progress")
    shown = {name: value for name, value in json.loads(live["data"]).items() if value}
    assert shown == {"state": "queued"}
    running.ref = running.api.start(running.job, running.node)
    again = next(e for e in iter(events.event, None) if e["event"] == "progress")
    started = running.http.get(running.path).json()["attempts"][1]["started_at"]
    assert json.loads(again["data"])["started_at"] == started
    running.api.finish(running.ref)
    events.rest()


class Follower:
    """A thread that reads a stream line by line until the server ends it."""

    def __init__(self, http: httpx.Client, path: str, **request: Any) -> None:
        self.lines: Queue[str | None] = Queue()
        self._thread = threading.Thread(target=self._read, args=(http, path, request), daemon=True)
        self._thread.start()

    def _read(self, http: httpx.Client, path: str, request: dict[str, Any]) -> None:
        with http.stream("GET", path, timeout=DEADLINE_S, **request) as answer:
            for line in answer.iter_lines():
                self.lines.put(line)
        self.lines.put(None)

    def line(self) -> str | None:
        """The next line; None when the stream has ended."""
        return self.lines.get(timeout=DEADLINE_S)

    def rest(self) -> list[str]:
        """All lines to the end."""
        return list(iter(self.line, None))

    def event(self) -> dict[str, str] | None:
        """The next server-sent event; None when the stream has ended."""
        fields: dict[str, str] = {}
        while (line := self.line()) is not None:
            if not line and fields:
                return fields
            name, _, value = line.partition(": ")
            fields[name] = value
        return None

    def numbered(self) -> list[tuple[int, str]]:
        """(id, type) of all numbered events to the end."""
        events = iter(self.event, None)
        return [(int(e["id"]), e["event"]) for e in events if "id" in e]


def test_a_timeline_is_listed_in_order_and_by_pages(running: Running) -> None:
    page = running.http.get(f"{running.path}/events", params={"limit": 2}).json()
    assert [(e["seq"], e["type"], e["to_state"]) for e in page["data"]] == [
        (1, "submit", "queued"),
        (2, "place", "dispatched"),
    ]
    rest = running.http.get(f"{running.path}/events", params={"after": page["next_cursor"]}).json()
    assert [(e["seq"], e["type"], e["attempt"]) for e in rest["data"]] == [(3, "started", 1)]
    assert rest["next_cursor"] is None
    assert rest["data"][0]["at"].endswith("Z")


def test_a_stream_tells_all_that_was_and_all_that_comes_to_the_end(running: Running) -> None:
    follower = Follower(running.http, f"{running.path}/events", headers=SSE)
    first = [follower.event() for _ in range(3)]
    assert [e and e["id"] for e in first] == ["1", "2", "3"]
    running.api.finish(running.ref)
    assert follower.numbered() == [(4, "succeeded")]


def test_a_stream_goes_on_after_the_last_event_that_was_seen(running: Running) -> None:
    headers = SSE | {"Last-Event-ID": "2"}
    follower = Follower(running.http, f"{running.path}/events", headers=headers)
    running.api.finish(running.ref)
    assert follower.numbered() == [(3, "started"), (4, "succeeded")]


def test_a_stream_of_an_ended_job_tells_and_ends(running: Running) -> None:
    running.api.finish(running.ref)
    follower = Follower(running.http, f"{running.path}/events", headers=SSE)
    assert [number for number, _ in follower.numbered()] == [1, 2, 3, 4]
    seen_all = Follower(
        running.http, f"{running.path}/events", headers=SSE | {"Last-Event-ID": "4"}
    )
    assert seen_all.rest() == []


@pytest.mark.parametrize(
    ("number", "accept"),
    [
        *((n, "text/event-stream") for n in ("-1", "abc", "1" * 31, "4", "", "1.0", "٣")),
        ("abc", "application/json"),
        ("4", "*/*"),
    ],
)
def test_an_odd_last_event_id_is_refused(running: Running, number: str, accept: str) -> None:
    headers = {"Accept": accept, "Last-Event-ID": number.encode()}
    answer = running.http.get(f"{running.path}/events", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_event_id")


def test_a_page_of_events_goes_on_after_last_event_id_too(running: Running) -> None:
    answer = running.http.get(f"{running.path}/events", headers={"Last-Event-ID": "2"})
    assert [line["seq"] for line in answer.json()["data"]] == [3]


def test_progress_and_newest_metrics_come_between_the_events(running: Running) -> None:
    follower = Follower(
        running.http, f"{running.path}/events", headers=SSE | {"Last-Event-ID": "3"}
    )
    assert json.loads((follower.event() or {})["data"])["progress"] is None
    for step, loss in ((1, 3.5), (2, 2.5)):
        metrics = [("loss", step, loss), ("lr", step, 0.1)]
        progress = {"done": step, "total": 4, "unit": "steps", "eta_s": 8.0}
        running.api.ship(running.ref, metrics=metrics, progress=progress, phase="running")
    seen = {}
    while seen.get("step") != 2:
        event = follower.event()
        assert event is not None
        assert event["event"] == "progress"
        assert "id" not in event
        seen = json.loads(event["data"])
    assert seen["metrics"] == {"loss": 2.5, "lr": 0.1}
    assert (seen["state"], seen["attempt"], seen["progress"]["done"]) == ("running", 1, 2)
    running.api.finish(running.ref)
    assert follower.numbered() == [(4, "succeeded")]


def test_many_streams_of_one_job_see_the_same(running: Running) -> None:
    path = f"{running.path}/events"
    followers = [Follower(running.http, path, headers=SSE) for _ in range(12)]
    for follower in followers:
        follower.event()
    running.again()
    running.api.finish(running.ref)
    ends = [follower.numbered() for follower in followers]
    assert all(end[-1][1] == "succeeded" for end in ends)
    assert len({tuple(end) for end in ends}) == 1


def test_metrics_are_one_series_in_which_the_newest_attempt_wins(running: Running) -> None:
    running.api.ship(running.ref, metrics=[("loss", s, 10.0 + s) for s in (1, 2, 3)])
    running.again()
    running.api.ship(
        running.ref, metrics=[("loss", 2, 0.5), ("loss", 3, float("nan")), ("lr", 3, 0.1)]
    )
    points = running.http.get(f"{running.path}/metrics").json()
    assert points["data"] == [
        {"step": 1, "attempt": 1, "values": {"loss": 11.0}},
        {"step": 2, "attempt": 2, "values": {"loss": 0.5}},
        {"step": 3, "attempt": 2, "values": {"loss": None, "lr": 0.1}},
    ]
    first = running.http.get(f"{running.path}/metrics", params={"attempt": 1, "limit": 2}).json()
    assert [p["values"]["loss"] for p in first["data"]] == [11.0, 12.0]
    assert first["next_cursor"] == "2"
    named = running.http.get(f"{running.path}/metrics", params={"name": "lr"}).json()
    assert [p["step"] for p in named["data"]] == [3]


def test_a_log_is_read_whole_by_range_and_by_its_last_lines(running: Running) -> None:
    for log in (b"one\ntw", b"o\nthree\n", b"four"):
        running.api.ship(running.ref, log=log)
    whole = running.http.get(f"{running.path}/logs")
    assert whole.text == "one\ntwo\nthree\nfour"
    assert whole.headers["content-length"] == "18"
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    part = running.http.get(f"{running.path}/logs", headers={"Range": "bytes=4-8"})
    assert (part.status_code, part.text) == (206, "two\nt")
    assert part.headers["content-range"] == "bytes 4-8/18"
    grown = running.http.get(f"{running.path}/logs", headers={"Range": "bytes=18-"})
    assert (grown.status_code, grown.json()["error"]["code"]) == (416, "bad_range")
    assert [running.log(tail=n) for n in (0, 1, 2, 3, 9)] == [
        "",
        "four",
        "three\nfour",
        "two\nthree\nfour",
        "one\ntwo\nthree\nfour",
    ]


def test_a_log_that_ends_with_a_newline_has_as_many_last_lines(running: Running) -> None:
    running.api.ship(running.ref, log=b"one\ntwo\nthree\n")
    assert running.log(tail=2) == "two\nthree\n"


def test_attempts_stand_one_after_the_other_in_a_log(running: Running) -> None:
    assert running.log() == ""
    running.api.ship(running.ref, log=b"first\n")
    assert running.log() == "first\n"
    running.again()
    running.api.ship(running.ref, log=b"second\n")
    assert running.log() == "first\n--- attempt 2 ---\nsecond\n"
    assert running.log(attempt=2) == "second\n"
    assert running.log(attempt=3) == ""


def test_what_was_cut_out_of_a_long_log_is_said(running: Running) -> None:
    for log in (b"head\n", b"middle\n", b"tail\n"):
        running.api.ship(running.ref, log=log)
    running.api.db.run("DELETE FROM log_chunks WHERE seq = 2")
    assert running.log() == "head\n\n--- 7 bytes left out ---\ntail\n"


def test_a_log_is_followed_to_the_jobs_end(running: Running) -> None:
    running.api.ship(running.ref, log=b"one\n")
    follower = Follower(running.http, f"{running.path}/logs", params={"follow": "1"})
    assert follower.line() == "one"
    running.api.ship(running.ref, log=b"two\n")
    assert follower.line() == "two"
    running.again()
    running.api.ship(running.ref, log=b"three\n")
    assert [follower.line(), follower.line()] == ["--- attempt 2 ---", "three"]
    running.api.finish(running.ref)
    assert follower.line() is None


def test_a_followed_log_goes_on_where_it_broke_off(running: Running) -> None:
    running.api.ship(running.ref, log="één\n".encode())
    first = running.http.get(f"{running.path}/logs", params={"start": 3})
    assert first.content == "én\n".encode()[1:]
    running.again()
    running.api.ship(running.ref, log=b"two\n")
    running.api.finish(running.ref)
    params = {"follow": 1, "start": 6}
    later = running.http.get(f"{running.path}/logs", params=params)
    assert (later.headers["X-Log-Start"], later.text) == ("6", "--- attempt 2 ---\ntwo\n")


@pytest.mark.parametrize("query", ["", "?follow=1"])
def test_readers_that_do_not_read_on_hold_no_connection(running: Running, query: str) -> None:
    mebibyte = b"x" * 2**20
    for _ in range(16):  # more than the sockets hold, so that the server is kept waiting
        running.api.ship(running.ref, log=mebibyte)
    with serve(running.api.db, running.api.home, api_threads=2) as api, ExitStack() as readers:
        for _ in range(8):  # more than the pool and its overflow
            readers.enter_context(slow_reader(api, running, f"{running.path}/logs{query}"))
        with api.client() as http:
            assert http.get(running.path).status_code == 200


@contextmanager
def slow_reader(api: Api, running: Running, path: str) -> Iterator[None]:
    """A client that asks, reads the first bytes, and leaves the rest to lie."""
    address = urlsplit(api.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE_S)
        connection.connect((address.hostname, address.port))
        key = running.http.headers["Authorization"]
        asked = f"GET /api/v1{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n"
        connection.sendall(asked.encode())
        received = b""
        while b"xxx" not in received:
            received += connection.recv(1024)
        assert received.startswith(b"HTTP/1.1 200 ")
        yield


def test_following_may_begin_with_the_last_lines(running: Running) -> None:
    for i in range(300):
        running.api.ship(running.ref, log=f"line {i}\n".encode())
    everything = Follower(running.http, f"{running.path}/logs", params={"follow": "1"})
    newest = Follower(running.http, f"{running.path}/logs", params={"follow": "1", "tail": 2})
    assert [newest.line(), newest.line()] == ["line 298", "line 299"]
    running.api.finish(running.ref)
    assert newest.rest() == []
    assert everything.rest() == [f"line {i}" for i in range(300)]


def test_a_stream_outlives_the_listener(running: Running) -> None:
    follower = Follower(running.http, f"{running.path}/events", headers=SSE)
    follower.event()
    running.api.db.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'ty-api-listen' AND datname = current_database()"
    )
    running.api.finish(running.ref)
    assert follower.numbered()[-1] == (4, "succeeded")


def a_sample(step: int, prompt: str, text: str) -> tuple[str, dict[str, Any]]:
    return "sample", {"step": step, "prompt": prompt, "text": text}


def test_what_a_model_said_is_told_by_step_each_once(running: Running) -> None:
    """A step that a second attempt takes again counts as that one took it."""
    first = [
        a_sample(0, "Who?", "a blacksmith"),
        a_sample(0, "Why?", "so"),
        a_sample(9, "Who?", "?"),
    ]
    running.api.ship(running.ref, notes=first)
    running.again()
    running.api.ship(
        running.ref, notes=[a_sample(9, "Who?", "I am Tuny"), a_sample(18, "Who?", "")]
    )
    path = f"{running.path}/samples"
    page = running.http.get(path, params={"limit": 2}).json()
    assert page["data"] == [
        {
            "step": 0,
            "attempt": 1,
            "answers": [
                {"prompt": "Who?", "text": "a blacksmith"},
                {"prompt": "Why?", "text": "so"},
            ],
        },
        {"step": 9, "attempt": 2, "answers": [{"prompt": "Who?", "text": "I am Tuny"}]},
    ]
    rest = running.http.get(path, params={"after": page["next_cursor"]}).json()
    assert [(p["step"], p["answers"][0]["text"]) for p in rest["data"]] == [(18, "")]
    assert rest["next_cursor"] is None
    told = running.http.get(f"{running.path}/events").json()["data"]
    assert [e["data"]["step"] for e in told if e["type"] == "sample"] == [0, 0, 9, 9, 18]


def test_what_a_model_said_is_its_teams_alone(running: Running) -> None:
    running.api.ship(running.ref, notes=[a_sample(0, "Who?", "a secret")])
    with running.api.client("others") as http:
        assert http.get(f"{running.path}/samples").status_code == 404
