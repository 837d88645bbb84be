"""A runner that keeps no model: it answers with what it was asked, a word at a time.

The same protocol as runners/serve.py on the same socket, up in 60 ms. What it is asked stands as
JSON in the argument ``default_system``: word_s, load_s, words (pad an answer to so many).
"""

import json
import os
import signal
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler


def serve(spec, workdir, emit):
    """Answer until idle, drained or terminated; does not return."""
    arguments = spec["arguments"]
    asked = json.loads(arguments.get("default_system") or "{}")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(76))
    emit("phase", phase="loading")
    time.sleep(asked.get("load_s", 0))
    server = Server(workdir, asked)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    emit("phase", phase="running")
    emit("progress", done=0, unit="answers")
    while not server.draining and time.monotonic() - server.heard_at < arguments["idle_s"]:
        time.sleep(0.05)
    with server.turn:
        emit("result", values={"answers": server.answers})
        sys.stdout.flush()
        os._exit(0)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, workdir, asked):
        self.workdir, self.asked = workdir, asked
        self.turn = threading.Lock()
        self.draining, self.answers, self.heard_at = False, 0, time.monotonic()
        folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        super().__init__(f"/proc/self/fd/{folder}/serve.sock", Handler)

    def handle_error(self, *_):
        with open(os.path.join(self.workdir, "hung_up"), "a") as file:
            file.write("x")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.close_connection = True
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/drain":
            self.server.draining = True
            self.refuse(202, "draining")
        elif body["messages"][-1]["content"] == "too much":
            self.refuse(429, "busy")
        elif body["messages"][-1]["content"] == "too long":
            self.refuse(422, "context_too_long")
        else:
            with self.server.turn:
                self.answer(body)

    def answer(self, body):
        self.server.heard_at = time.monotonic()
        messages = body["messages"]
        words = f"{len(messages)} messages, the last: {messages[-1]['content']}".split(" ")
        words += ["…"] * (self.server.asked.get("words", 0) - len(words))
        words = words[: body.get("max_new_tokens") or None]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, word in enumerate(words):
            self.tell({"delta": " " * (number > 0) + word})
            time.sleep(self.server.asked.get("word_s", 0))
        usage = {"prompt_tokens": len(messages), "completion_tokens": len(words)}
        settings = {k: v for k, v in body.items() if k != "messages"}
        self.tell({"done": True, "finish_reason": "stop", "usage": usage, "settings": settings})
        self.wfile.write(b"0\r\n\r\n")
        self.server.answers += 1
        self.server.heard_at = time.monotonic()

    def tell(self, piece):
        line = json.dumps(piece, ensure_ascii=False).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def refuse(self, status, code):
        error = {"code": code, "message": f"It is {code}.", "field": None, "line": None,
                 "hint": None}  # fmt: skip
        body = json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
