"""`tuneyard chat` against recorded answers: what breaks off, and what a person types and sees."""

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.recorded_api import (
    Answer,
    RecordedApi,
    a_job,
    events,
    ids,
    moved,
    page,
    recorded_api,
    refusal,
)

TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]
WITHIN_S = 20.0
JOB, NEXT, *_ = ids("job", 3)
READY = {"state": "running", "phase": "running", "attempt": 1}
LOADING = READY | {"phase": "loading"}
MODEL = {"id": "base_1", "name": "m", "kind": "base", "artifact": None}
DONE = {"done": True, "finish_reason": "stop", "usage": {"prompt_tokens": 1}, "settings": {}}
AWAY = {"error": {"code": "runner_away", "message": "It broke off.", "hint": None}}


def said(*pieces: dict[str, Any], **more: Any) -> Answer:
    """An answer in pieces."""
    text = "".join(
        f"event: {next(iter(piece))}\ndata: {json.dumps(piece, ensure_ascii=False)}\n\n"
        for piece in pieces
    )
    return Answer(text.encode(), headers={"Content-Type": "text/event-stream"}, **more)


@pytest.fixture
def api() -> Iterator[RecordedApi]:
    with recorded_api() as api:
        api.on("GET", "/jobs", page())
        api.on("POST", "/jobs", Answer(a_job(JOB, name="chat-m"), 201))
        api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running"))
        api.on("GET", f"/jobs/{JOB}/events", events(LOADING, READY))
        api.on("POST", f"/jobs/{JOB}/drain", Answer(a_job(JOB, state="running"), 202))
        yield api


@pytest.fixture
def env(api: RecordedApi, tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH", "LANG")}
    own = {"TUNEYARD_HOME": str(tmp_path / "home"), "TERM": "xterm", "PYTHONUTF8": "1"}
    return kept | api.env | own


def piped(env: dict[str, str], lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TUNEYARD, "chat", "m", *arguments]
    return subprocess.run(
        command, env=env, input=lines, capture_output=True, text=True, check=False, timeout=WITHIN_S
    )


def questions(api: RecordedApi, job: str = JOB) -> list[Any]:
    """The conversations that were sent."""
    return [asked.json["messages"] for asked in api.requests("POST", f"/jobs/{job}/chat")]


def test_the_whole_conversation_goes_along_with_each_question(
    api: RecordedApi, env: dict[str, str]
) -> None:
    api.on("POST", f"/jobs/{JOB}/chat", said({"delta": "I am "}, {"delta": "m."}, DONE))
    done = piped(env, "Who?\nWhy?\n", "--system", "Be brief.", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, "I am m.\nI am m.\n"), done.stderr
    assert [message["content"] for message in questions(api)[1]] == [
        "Be brief.", "Who?", "I am m.", "Why?",
    ]  # fmt: skip
    (first, _) = api.requests("POST", f"/jobs/{JOB}/chat")
    assert (first.json["temperature"], first.json["stream"]) == (0, True)
    assert len(api.requests("POST", f"/jobs/{JOB}/drain")) == 1
    assert "loading" in done.stderr


@pytest.mark.parametrize(
    "broken",
    [
        said({"delta": "I a"}, AWAY),
        said({"delta": "I a"}),
        refusal(409, "not_ready", "The model is not ready: attempt 2 is loading."),
        refusal(503, "gateway_away", "The gateway cannot be reached."),
    ],
)
def test_an_answer_that_broke_off_is_asked_for_again(
    api: RecordedApi, env: dict[str, str], broken: Answer
) -> None:
    api.on("POST", f"/jobs/{JOB}/chat", broken, said({"delta": "I am m."}, DONE))
    done = piped(env, "Who?\n")
    assert (done.returncode, done.stdout) == (0, "I am m.\n"), done.stderr
    first, second = questions(api)
    assert first == second == [{"role": "user", "content": "Who?"}]


def test_a_model_that_is_busy_is_asked_again_later(api: RecordedApi, env: dict[str, str]) -> None:
    busy = refusal(429, "busy", "9 questions wait already.")
    api.on("POST", f"/jobs/{JOB}/chat", busy, said({"waiting": 2}, {"delta": "Yes."}, DONE))
    done = piped(env, "Who?\n")
    assert done.stdout == "Yes.\n"
    assert "9 questions wait already." in done.stderr
    assert "waits for 2 other answers" in done.stderr


def test_a_job_that_was_idle_for_too_long_is_begun_anew_with_the_history(
    api: RecordedApi, env: dict[str, str]
) -> None:
    ended = refusal(410, "ended", "The job succeeded.")
    api.on("POST", "/jobs", Answer(a_job(JOB), 201), Answer(a_job(NEXT), 201))
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="succeeded"))
    api.on("POST", f"/jobs/{JOB}/chat", said({"delta": "One."}, DONE), ended)
    gone = events(moved(1, "succeeded", "succeeded"))
    api.on("GET", f"/jobs/{JOB}/events", events(READY), gone)
    api.on("GET", f"/jobs/{NEXT}/events", events(READY))
    api.on("POST", f"/jobs/{NEXT}/chat", said({"delta": "Two."}, DONE))
    done = piped(env, "a\nb\n")
    assert (done.returncode, done.stdout) == (0, "One.\nTwo.\n"), done.stderr
    assert "the model is loaded again" in done.stderr
    assert [message["content"] for message in questions(api, NEXT)[0]] == ["a", "One.", "b"]


@pytest.mark.parametrize(
    ("arguments", "more"), [((), {}), (("--set", "max_tokens=5"), {"max_new_tokens": 5})]
)
def test_a_job_of_others_is_joined_and_not_ended(
    api: RecordedApi, env: dict[str, str], arguments: tuple[str, ...], more: dict[str, Any]
) -> None:
    spec, inputs = {"kind": "serve", "model": "m"} | more, {"model": "base_1"}
    stale = a_job(NEXT, state="running", spec=spec, inputs={"model": "base_0"})
    other = a_job(NEXT, state="running", spec=spec | {"device": "cpu"}, inputs=inputs)
    same = a_job(JOB, state="running", spec=spec, inputs=inputs)
    api.on("GET", "/jobs", page(other, stale, same))
    api.on("GET", "/models/m", MODEL)
    lines = Answer(page({"seq": 7, "type": "started"}))
    api.on("GET", f"/jobs/{JOB}/events", lines, events(READY))
    api.on("POST", f"/jobs/{JOB}/chat", said({"delta": "Yes."}, DONE))
    done = piped(env, "Who?\n", *arguments)
    assert (done.returncode, done.stdout) == (0, "Yes.\n"), done.stderr
    assert api.requests("POST", "/jobs") == []
    assert api.requests("POST", f"/jobs/{JOB}/drain") == []


def test_a_kept_model_is_not_ended(api: RecordedApi, env: dict[str, str]) -> None:
    assert piped(env, "", "--keep").returncode == 0
    assert api.requests("POST", f"/jobs/{JOB}/drain") == []


def test_a_job_that_fails_while_loading_ends_the_chat_with_its_reason(
    api: RecordedApi, env: dict[str, str]
) -> None:
    error = {"code": "bad_spec", "message": "The base has no chat template."}
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, name="chat-m", state="failed", error=error))
    api.on("GET", f"/jobs/{JOB}/events", events(LOADING, moved(2, "failed", "failed")))
    done = piped(env, "Who?\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no chat template" in done.stderr


def test_ctrl_c_while_it_loads_ends_the_job_and_leaves_with_130(
    api: RecordedApi, env: dict[str, str]
) -> None:
    hold = threading.Event()
    api.on("GET", f"/jobs/{JOB}/events", events(LOADING, open_until=hold))
    with subprocess.Popen(
        [*TUNEYARD, "chat", "m"], env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while b"loading" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 130
        hold.set()
    assert len(api.requests("POST", f"/jobs/{JOB}/drain")) == 1


class Person:
    """Someone at a terminal."""

    def __init__(self, env: dict[str, str], *arguments: str) -> None:
        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [*TUNEYARD, "chat", "m", *arguments],
            env=env, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )  # fmt: skip
        os.close(follower)
        self.shown = ""

    def sees(self, text: str) -> None:
        """Wait until this stands on the screen, after what was waited for before."""
        deadline = time.monotonic() + WITHIN_S
        while text not in self.shown:
            left = deadline - time.monotonic()
            ready, *_ = select.select([self._leader], [], [], max(0.0, left))
            assert ready, f"no {text!r} in {self.shown!r}"
            try:
                self.shown += os.read(self._leader, 4096).decode()
            except OSError:
                raise AssertionError(f"no {text!r} in {self.shown!r}") from None
        self.shown = self.shown.partition(text)[2]

    def types(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def presses_ctrl_c_until(self, text: str) -> None:
        """Press Ctrl-C, and again where nothing answers, as one does.

        Python's readline writes the prompt before it waits for keys: a signal that comes in between
        is noticed with the next key.
        """
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            self.types("\x03")
            if select.select([self._leader], [], [], 1.0)[0]:
                break
        self.sees(text)

    def leaves(self) -> int:
        code = self.process.wait(WITHIN_S)
        os.close(self._leader)
        return code


@pytest.fixture
def person(api: RecordedApi, env: dict[str, str]) -> Iterator[Person]:
    person = Person(env)
    person.sees("Ctrl-D leaves")
    person.sees("> ")
    yield person
    if person.process.poll() is None:
        person.process.kill()
        person.leaves()


def test_a_person_chats_and_leaves_by_ctrl_d(
    api: RecordedApi, person: Person, tmp_path: Path
) -> None:
    hostile = "Yes \x1b[2Jand no."
    api.on("POST", f"/jobs/{JOB}/chat", said({"delta": hostile}, DONE))
    person.types("Who are you?\n")
    person.sees("Yes \ufffd[2Jand no.")
    person.sees("> ")
    person.types("/history\n")
    person.sees("user: Who are you?")
    person.sees("> ")
    person.types("/clear\n")
    person.sees("> ")
    person.types("/nothing\n")
    person.sees("There is no command /nothing.")
    person.sees("> ")
    person.types("Again?\n")
    person.sees("and no.")
    person.sees("> ")
    person.types("\x04")
    assert person.leaves() == 0
    assert questions(api)[-1] == [{"role": "user", "content": "Again?"}]
    history = tmp_path / "home" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "Who are you?" in history.read_text()
    assert len(api.requests("POST", f"/jobs/{JOB}/drain")) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(api: RecordedApi, person: Person) -> None:
    hold = threading.Event()
    api.on(
        "POST",
        f"/jobs/{JOB}/chat",
        said({"delta": "Once upon"}, open_until=hold),
        said({"delta": "The end."}, DONE),
    )
    person.types("A story\n")
    person.sees("Once upon")
    person.types("\x03")
    person.sees("(stopped)")
    hold.set()
    person.sees("> ")
    person.presses_ctrl_c_until("Ctrl-D or /exit leaves")
    person.sees("> ")
    person.types("Go on\n")
    person.sees("The end.")
    person.sees("> ")
    person.types("/exit\n")
    assert person.leaves() == 0
    assert [message["content"] for message in questions(api)[-1]] == [
        "A story", "Once upon", "Go on",
    ]  # fmt: skip


def test_a_refused_question_is_explained_and_the_chat_goes_on(
    api: RecordedApi, person: Person
) -> None:
    long = refusal(422, "context_too_long", "The conversation has 9000 tokens.", hint="begin anew")
    api.on("POST", f"/jobs/{JOB}/chat", long, said({"delta": "Fine."}, DONE))
    person.types("x\n")
    person.sees("The conversation has 9000 tokens.")
    person.sees("begin anew")
    person.sees("> ")
    person.types("y\n")
    person.sees("Fine.")
    person.sees("> ")
    person.types("\x04")
    assert person.leaves() == 0
    assert questions(api)[-1] == [{"role": "user", "content": "y"}]
