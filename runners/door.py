"""The runner's ear: HTTP/1.1 over WORKDIR/serve.sock, for whoever may open that file.

    POST /chat    {"messages": […], generation settings} -> 200, JSON lines as the answer grows:
                  {"waiting": 2}  so many are before (only if any)
                  {"delta": "…"}  whole characters; joined they are the answer
                  {"done": true, "finish_reason", "usage", "settings"}, the last line,
                  or {"error": {…}} instead of it
    POST /drain   answer what waits, take nothing more, end with exit code 0 -> 202

Refusals are {"error": {"code", "message", "field", "line", "hint"}}: 422 bad question, 429 busy,
410 ended. Closing the connection cancels the question.
"""

import json
import os
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Empty
from typing import Any

from tuneyard.runners.desk import Piece, Question
from tuneyard.specs.errors import InputError, TuneyardError
from tuneyard.specs.runner import SERVE_SOCKET

MAX_CONNECTIONS = 64
MAX_BODY_BYTES = 8 * 1024**2
READ_WITHIN_S = 10.0
WRITE_WITHIN_S = 30.0
LOOK_EVERY_S = 0.1
ENDS = ("done", "error")

Ask = Callable[[Mapping[str, Any]], tuple[Question, int]]


class Door(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Listens, a thread for each connection; ``ask`` puts a question in line, or refuses it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, workdir: Path, *, ask: Ask, drain: Callable[[], object]) -> None:
        self.ask, self.drain = ask, drain
        self.open = 0
        self._lock = threading.Lock()
        # Bound through the folder's descriptor: paths over 108 bytes fail.
        folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            (workdir / SERVE_SOCKET).unlink(missing_ok=True)
            super().__init__(f"/proc/self/fd/{folder}/{SERVE_SOCKET}", _Handler)
            (workdir / SERVE_SOCKET).chmod(0o600)
        finally:
            os.close(folder)

    def start(self) -> None:
        """Listen in a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(LOOK_EVERY_S,), daemon=True).start()

    def finish(self, *, within_s: float) -> None:
        """Stop listening, and give answers that are on their way a moment to leave."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + within_s
        while self.open and time.monotonic() < deadline:
            time.sleep(0.01)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        with self._lock:
            if self.open >= MAX_CONNECTIONS:
                return False
            self.open += 1
            return True

    def leave(self) -> None:
        """One connection is over."""
        with self._lock:
            self.open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked hung up in the middle: nobody is there to be told."""


class _Handler(BaseHTTPRequestHandler):
    """One question a connection."""

    server: Door
    protocol_version = "HTTP/1.1"
    timeout = READ_WITHIN_S

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.leave()

    def do_POST(self) -> None:
        """/chat and /drain."""
        self.close_connection = True
        try:
            document = self._document()  # of each: an answer is lost where its request lies unread
            if self.path == "/chat":
                self._chat(document)
            elif self.path == "/drain":
                self.server.drain()
                self._answer(202, {"state": "draining"})
            else:
                raise InputError("There is nothing at this address.", code="not_found")
        except TuneyardError as error:
            self._answer(error.http_status, {"error": error.as_dict()})

    def _chat(self, document: Mapping[str, Any]) -> None:
        question, ahead = self.server.ask(document)
        try:
            self._begin()
            if ahead:
                self._tell({"waiting": ahead})
            self._relay(question)
        except OSError:
            pass  # it hung up
        finally:
            question.gone.set()

    def _document(self) -> Mapping[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            message = f"A body of at most {MAX_BODY_BYTES} bytes with its length is needed."
            raise InputError(message, code="bad_body")
        try:
            document = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise InputError("The body is no JSON object.", code="malformed_json")
        return document

    def _relay(self, question: Question) -> None:
        """Write each piece as it comes, until the last one or until nobody reads."""
        while not self._hung_up():
            try:
                piece = question.pieces.get(timeout=LOOK_EVERY_S)
            except Empty:
                continue
            self._tell(piece)
            if any(name in piece for name in ENDS):
                self.wfile.write(b"0\r\n\r\n")
                return

    def _hung_up(self) -> bool:
        looking = select.poll()
        looking.register(self.connection, select.POLLIN)
        return bool(looking.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _begin(self) -> None:
        self.connection.settimeout(WRITE_WITHIN_S)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()

    def _tell(self, piece: Piece) -> None:
        line = json.dumps(piece, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _answer(self, status: int, value: Mapping[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: what is asked here is nobody else's affair."""
