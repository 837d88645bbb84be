"""A small HTTP server on 127.0.0.1 that plays recorded answers, and notes what is asked."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "ty-recorded"


@dataclass(frozen=True)
class Answer:
    """One answer. body: JSON unless bytes. open_until: the connection stays open after it."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    open_until: threading.Event | None = None
    says_bytes: int | None = None


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class RecordedApi:
    """The server: ``on`` records answers, ``asked`` lists what came.

    prefix: the path under which a proxy would show it; there is nothing elsewhere.
    """

    def __init__(self, prefix: str = "") -> None:
        self.asked: list[Asked] = []
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        self._lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _play(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                url = urlsplit(self.path)
                path = unquote(url.path)
                if path.startswith(f"{prefix}/api/v1/"):
                    path = path.removeprefix(f"{prefix}/api/v1")
                asked = Asked(
                    self.command, path, parse_qs(url.query), dict(self.headers.items()),
                    self.rfile.read(length),
                )  # fmt: skip
                api._serve(self, asked)

            do_GET = do_POST = do_DELETE = _play

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{prefix}"

    @property
    def env(self) -> dict[str, str]:
        """What makes the command ask this server."""
        return {"TUNEYARD_URL": self.url, "TUNEYARD_API_KEY": KEY}

    def on(self, method: str, path: str, *answers: Answer | Any) -> None:
        """Play these answers one after the other; the last one for ever."""
        played = [each if isinstance(each, Answer) else Answer(each) for each in answers]
        with self._lock:
            self._answers[method, path] = played

    def requests(self, method: str, path: str) -> list[Asked]:
        """What was asked there so far."""
        return [each for each in self.asked if (each.method, each.path) == (method, path)]

    def _serve(self, handler: BaseHTTPRequestHandler, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)
            answers = self._answers.get((asked.method, asked.path), [])
            answer = answers.pop(0) if len(answers) > 1 else answers[0] if answers else NOTHING
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.says_bytes is not None:
            handler.send_header("Content-Length", str(answer.says_bytes))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        if answer.open_until is not None:
            answer.open_until.wait(30)


def refusal(status: int, code: str, message: str, **more: Any) -> Answer:
    """An error in the one shape that all errors have."""
    error = {"code": code, "message": message, "field": None, "line": None, "hint": None} | more
    return Answer({"error": error}, status)


NOTHING = refusal(404, "not_found", "There is no such thing here.")


def page(*things: Any, next_cursor: str | None = None) -> dict[str, Any]:
    """A list as it is answered."""
    return {"data": list(things), "next_cursor": next_cursor}


def events(*lines: Mapping[str, Any] | str, torn: str = "", **more: Any) -> Answer:
    """A stream: timeline lines with ``seq`` are numbered, others are ``progress``."""
    text = "".join(each if isinstance(each, str) else _event(each) for each in lines) + torn
    return Answer(text.encode(), headers={"Content-Type": "text/event-stream"}, **more)


def _event(data: Mapping[str, Any]) -> str:
    shown = json.dumps(data, ensure_ascii=False)
    if "seq" not in data:
        return f"event: progress\ndata: {shown}\n\n"
    return f"id: {data['seq']}\nevent: {data['type']}\ndata: {shown}\n\n"


def moved(seq: int, type_: str, to_state: str, **data: Any) -> dict[str, Any]:
    """A line of a timeline that moves a job."""
    return {
        "seq": seq, "type": type_, "from_state": "-", "to_state": to_state, "attempt": 1,
        "at": "2026-01-01T00:00:00Z", "data": data,
    }  # fmt: skip


def a_job(job: str, *, state: str = "queued", **more: Any) -> dict[str, Any]:
    """A job as its owner sees it."""
    return {
        "id": job, "kind": "finetune", "name": "tuny", "state": state, "team": "default",
        "created_at": "2026-01-01T00:00:00Z", "wait_reason": None, "progress": None,
        "attempts": [], "error": None, "spec": {}, "notes": [],
    } | more  # fmt: skip


def a_file(file: str, *, name: str, sha256: str, state: str = "processed", **more: Any) -> Any:
    """An uploaded file."""
    return {
        "id": file, "name": name, "purpose": "dataset", "bytes": 1, "sha256": sha256,
        "state": state, "report": {"rows": 2}, "created_at": "2026-01-01T00:00:00Z",
    } | more  # fmt: skip


@contextmanager
def recorded_api(prefix: str = "") -> Iterator[RecordedApi]:
    """A running server."""
    api = RecordedApi(prefix)
    thread = threading.Thread(target=api._server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api._server.shutdown()
        api._server.server_close()
        thread.join()


def ids(prefix: str, count: int) -> Sequence[str]:
    """Well-formed ids."""
    return [f"{prefix}_{number:032x}" for number in range(1, count + 1)]
