"""Chatting through API, gateway and worker; the runner answers with what it was asked."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import IO, Any

import httpx
import pytest
from support.apis import Api, serve
from support.clusters import Cluster
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.yards import TUNEYARD, wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.specs.ids import parse_id

WITHIN_S = 30
WHO = [{"role": "user", "content": "Who are you?"}]
ECHO = "1 messages, the last: Who are you?"
SLOW = json.dumps({"word_s": 0.05, "words": 400})


@dataclass
class Yard:
    """A cluster with an API before it, as one team sees them."""

    cluster: Cluster
    api: Api
    http: httpx.Client

    def serve(self, **more: Any) -> str:
        """Submit a serve job."""
        answer = self.http.post("/jobs", json={"kind": "serve", "model": "m"} | more)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def ready(self, **more: Any) -> str:
        """A serve job that answers."""
        job = self.serve(**more)
        self.wait_ready(job)
        return job

    def wait_ready(self, job: str, *, attempt: int = 1) -> None:
        """Wait until an attempt of a job listens."""

        def look() -> bool:
            newest = (self.http.get(f"/jobs/{job}").json()["attempts"] or [{}])[-1]
            return newest.get("number") == attempt and newest["phase"] == "running"

        wait_for(look, within_s=WITHIN_S, what=f"attempt {attempt} of {job} to be ready")

    def ask(self, job: str, messages: Any = None, **more: Any) -> httpx.Response:
        """One question, and its whole answer."""
        body = {"messages": messages or WHO} | more
        return self.http.post(f"/jobs/{job}/chat", json=body)

    def row(self, job: str) -> Any:
        """The job's row."""
        return self.cluster.job(parse_id("job", job))

    def finish(self, job: str) -> str:
        """Wait for the job's end."""
        return self.cluster.finish(parse_id("job", job))

    def guard_file(self, job: str) -> dict[str, Any]:
        """guard.json of the newest attempt."""
        return self.cluster.guard_file(parse_id("job", job))

    def newest(self) -> Any:
        """The newest serve job."""
        return self.http.get("/jobs?kind=serve&limit=1").json()["data"][0]

    def cli(self, *arguments: str) -> "subprocess.Popen[str]":
        """`tuneyard chat` with pipes on all ends."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
        env |= {
            "TUNEYARD_URL": self.api.url,
            "TUNEYARD_API_KEY": "ty-default-admin",
            "TUNEYARD_HOME": str(self.cluster.home / "client"),
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*TUNEYARD, "chat", *arguments],
            env=env,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )


@pytest.fixture(scope="module")
def yard(
    shared_db: TestDatabase, valkey: RunningValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Yard]:
    """One cluster of two CPU slots that has a model, and an API before it, for all tests here."""
    home = tmp_path_factory.mktemp("chat") / "home"
    home.mkdir()
    with serve(shared_db, home) as api, api.client() as http:
        cluster = Cluster(shared_db, home, valkey.url, {"cpu_slots": 2})
        cluster.start("scheduler")
        cluster.start("worker")
        assert cluster.finish(cluster.submit(name="m", steps=1)) == "succeeded"
        yield Yard(cluster, api, http)
        cluster.stop()
        assert broken_invariants(shared_db) == {}


@pytest.fixture(autouse=True)
def _empty(yard: Yard) -> Iterator[None]:
    """Each test finds both slots free."""
    yield
    for job in yard.http.get("/jobs?kind=serve&state=running,dispatched,queued").json()["data"]:
        yard.http.post(f"/jobs/{job['id']}/cancel")
        yard.finish(job["id"])


def events_of(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, data) of an answer in pieces."""
    kind = ""
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def test_a_question_is_answered_whole_or_in_pieces_and_a_drained_job_has_succeeded(
    yard: Yard,
) -> None:
    job = yard.ready()
    whole = yard.ask(job, temperature=0.5, max_tokens=5).json()
    assert whole == {
        "text": "1 messages, the last: Who",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 5},
        "settings": {"temperature": 0.5, "max_new_tokens": 5},
        "job": job,
        "attempt": 1,
    }
    body = {"messages": WHO, "stream": True}
    with yard.http.stream("POST", f"/jobs/{job}/chat", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = list(events_of(answer))
    assert "".join(data["delta"] for kind, data in pieces if kind == "delta") == ECHO
    assert [kind for kind, _ in pieces][-1] == "done"
    assert yard.http.post(f"/jobs/{job}/drain").status_code == 202
    assert yard.finish(job) == "succeeded"
    ended = yard.ask(job)
    assert (ended.status_code, ended.json()["error"]["code"]) == (410, "ended")


def test_who_may_not_or_cannot_ask_is_told_why(yard: Yard) -> None:
    job, other = yard.ready(), yard.serve(default_system='{"load_s": 60}')

    def asked(job: str, http: httpx.Client = yard.http, **body: Any) -> tuple[int, str, str]:
        answer = http.post(f"/jobs/{job}/chat", json={"messages": WHO} | body)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    with yard.api.client("others") as others:
        assert asked(job, others)[:2] == (404, "not_found")
        assert others.post(f"/jobs/{job}/drain").status_code == 404
    with yard.api.client(role="viewer") as viewer:
        assert asked(job, viewer)[:2] == (403, "forbidden")
    assert asked(job, temprature=1) == (
        422, "unknown_field", "There is no field 'temprature' here.",
    )  # fmt: skip
    assert asked(job, messages=[])[:2] == (422, "out_of_range")
    assert asked(job, messages=[{"role": "user", "content": "too long"}])[1] == "context_too_long"
    busy = yard.ask(job, [{"role": "user", "content": "too much"}])
    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
    assert busy.json()["error"]["code"] == "busy"
    tune = yard.cluster.db.rows("SELECT id FROM jobs WHERE kind = 'download'")[0].id
    assert asked(f"job_{tune.hex}")[:2] == (404, "not_found")  # of another team
    wait_for(
        lambda: asked(other)[2] == "The model is not ready: attempt 1 is loading.",
        within_s=WITHIN_S,
        what="the second job to load",
    )
    third = yard.serve()
    wait_for(
        lambda: asked(third)[2] == "The model is not ready: waits for 1 CPU slot: 2 of 2 busy.",
        within_s=WITHIN_S,
        what="a reason for waiting",
    )
    assert asked(third)[:2] == (409, "not_ready")
    yard.http.post(f"/jobs/{third}/drain")
    assert yard.finish(third) == "cancelled"
    large = yard.ask(job, [{"role": "user", "content": "x" * 3_000_000}])
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_answer(yard: Yard, stream: bool) -> None:
    job = yard.ready(default_system=SLOW)
    attempt = yard.cluster.attempts(parse_id("job", job))[0].id
    hung_up = yard.cluster.home / "work" / f"attempt_{attempt.hex}" / "hung_up"
    body = {"messages": WHO, "stream": stream}
    if stream:
        with yard.http.stream("POST", f"/jobs/{job}/chat", json=body) as answer:
            next(events_of(answer))
    else:
        with pytest.raises(httpx.ReadTimeout):
            yard.http.post(f"/jobs/{job}/chat", json=body, timeout=1)
    wait_for(hung_up.exists, within_s=5, what="the runner to notice")


def test_a_stream_that_has_nothing_to_say_shows_that_it_lives(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.api.chat.HEARTBEAT_EVERY_S", 0.05)
    job = yard.ready(default_system='{"word_s": 0.3}')
    body = {"messages": WHO, "stream": True, "max_new_tokens": 2}
    with yard.http.stream("POST", f"/jobs/{job}/chat", json=body) as answer:
        lines = list(answer.iter_lines())
    assert ": still here" in lines
    assert "event: done" in lines


def test_the_gateway_opens_to_the_nodes_token_alone(yard: Yard) -> None:
    job = yard.ready()
    attempt = yard.cluster.attempts(parse_id("job", job))[0].id
    (node,) = yard.cluster.db.rows("SELECT gateway_url, gateway_token FROM nodes")
    assert node.gateway_token not in yard.http.get("/nodes").text

    def knock(path: str, token: str) -> tuple[int, str]:
        with httpx.Client(trust_env=False) as http:
            headers = {"Authorization": f"Bearer {token}"}
            answer = http.post(node.gateway_url + path, headers=headers, json={"messages": WHO})
        return answer.status_code, answer.text

    place = f"/attempts/attempt_{attempt.hex}/chat"
    assert knock(place, "guessed")[0] == 401
    assert knock(place, node.gateway_token)[0] == 200
    assert knock(f"/attempts/attempt_{attempt.hex}/../chat", node.gateway_token)[0] == 404
    assert knock(f"/attempts/attempt_{'0' * 32}/chat", node.gateway_token)[0] == 502


def test_a_killed_worker_or_gateway_costs_a_chat_nothing_but_a_moment(
    yard: Yard,
) -> None:
    job = yard.ready()
    before = yard.guard_file(job)["runner_pid"]
    for victim in ("gateway", "worker"):
        if victim == "worker":
            yard.cluster.kill("worker")
            away = yard.ask(job)
            assert (away.status_code, away.json()["error"]["code"]) == (503, "gateway_away")
            yard.cluster.start("worker")
        else:
            os.kill(gateway_of(yard.cluster), signal.SIGKILL)
        wait_for(
            lambda: yard.ask(job).status_code == 200,
            within_s=WITHIN_S,
            what=f"an answer after the {victim} was killed",
        )
    assert yard.guard_file(job)["runner_pid"] == before
    assert yard.http.get(f"/jobs/{job}").json()["attempts"][-1]["number"] == 1


def gateway_of(cluster: Cluster) -> int:
    """The pid of the worker's gateway."""
    worker = cluster.processes["worker"].pid
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
            command = Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:
            continue
        if b"gateway.py" in command and int(stat.rpartition(")")[2].split()[1]) == worker:
            return int(name)
    raise AssertionError("there is no gateway")


def test_a_worker_that_stops_or_a_cancel_says_so_to_who_asks(yard: Yard) -> None:
    job = yard.ready()
    yard.cluster.kill("worker", signal.SIGTERM)
    yard.cluster.start("worker")
    (first, *_) = yard.http.get(f"/jobs/{job}").json()["attempts"]
    assert (first["outcome"], first["charged"]) == ("stopped", False)
    yard.wait_ready(job, attempt=2)
    assert yard.ask(job).json()["attempt"] == 2
    yard.http.post(f"/jobs/{job}/cancel")
    assert yard.finish(job) == "cancelled"


def test_a_job_that_nobody_asks_ends_as_succeeded(yard: Yard) -> None:
    assert yard.finish(yard.serve(idle_s=0.3)) == "succeeded"


class Lines:
    """What a process writes, line by line as it comes."""

    def __init__(self, stream: IO[str]) -> None:
        self.seen: list[str] = []
        self._lines: Queue[str] = Queue()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))

    def next(self, holding: str = "") -> str:
        """The next line that holds this."""
        while True:
            line = self._lines.get(timeout=WITHIN_S)
            self.seen.append(line)
            if holding in line:
                return line


def test_a_piped_chat_keeps_its_history_through_a_killed_runner(
    yard: Yard,
) -> None:
    with yard.cli("m", "--system", "Be brief.") as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        out, err = Lines(chat.stdout), Lines(chat.stderr)
        for number, turn in enumerate(["first", "/clear", "second", "third"]):
            chat.stdin.write(f"{turn}\n")
            chat.stdin.flush()
            if turn == "first":
                assert out.next() == "2 messages, the last: first"
            if turn == "third":
                assert out.next() == "2 messages, the last: second"
                assert out.next() == "4 messages, the last: third", number
        job = yard.newest()["id"]
        os.kill(yard.guard_file(job)["runner_pid"], signal.SIGKILL)
        chat.stdin.write("fourth\n")
        chat.stdin.flush()
        assert err.next("lost").endswith("the job is tried again")
        assert out.next() == "6 messages, the last: fourth"
        chat.stdin.close()
        assert chat.wait(WITHIN_S) == 0
    assert yard.finish(job) == "succeeded"
    assert [a.cause for a in yard.cluster.attempts(parse_id("job", job))] == ["killed", None]


def test_a_kept_model_is_joined_by_the_next_chat(yard: Yard) -> None:
    answers = []
    for arguments in (("--keep",), ("--json", "--max-new-tokens", "3")):
        with yard.cli("m", *arguments) as chat:
            out, err = chat.communicate("Hello\n\n/exit\nnever asked\n", timeout=WITHIN_S)
        assert chat.returncode == 0, err
        answers.append(out)
    job = yard.newest()
    assert (job["state"], job["name"]) == ("running", "chat-m")
    assert f"joins {job['id']}" in err
    assert answers[0] == "1 messages, the last: Hello\n"
    assert json.loads(answers[1]) == {
        "prompt": "Hello",
        "text": "1 messages, the",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 3},
        "settings": {"max_new_tokens": 3},
        "job": job["id"],
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nothing",), 3, "There is no model 'nothing'"),
        (("../etc",), 2, "is no name of a model"),
        (("m", "--temperature", "-1"), 2, "temperature"),
        (("m", "--set", "idle_s=0"), 2, "idle_s"),
    ],
)
def test_a_chat_that_cannot_begin_says_why_and_leaves_nothing(
    yard: Yard, arguments: tuple[str, ...], code: int, said: str
) -> None:
    before = yard.http.get("/jobs").json()["data"]
    with yard.cli(*arguments) as chat:
        out, err = chat.communicate("Hello\n", timeout=WITHIN_S)
    assert (chat.returncode, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert yard.http.get("/jobs").json()["data"] == before


def test_a_question_that_cannot_be_answered_ends_a_piped_chat_with_3(
    yard: Yard,
) -> None:
    with yard.cli("m") as chat:
        out, err = chat.communicate("Hello\ntoo long\nnever asked\n", timeout=WITHIN_S)
    assert chat.returncode == 3
    assert out == "1 messages, the last: Hello\n"
    assert "It is context_too_long." in err
    job = yard.newest()
    assert yard.finish(job["id"]) == "succeeded"


def test_a_model_that_cannot_be_loaded_ends_the_chat_with_1(yard: Yard) -> None:
    with yard.cli("m", "--set", "default_system=no JSON") as chat:
        out, err = chat.communicate("Hello\n", timeout=WITHIN_S)
    assert (chat.returncode, out) == (1, "")
    assert "chat-m failed" in err
