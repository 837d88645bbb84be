"""Flower in tests: the real one on a broker, and one that answers whatever a test wants."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from support.yards import wait_for
from tuneyard.local.ports import any_free


@dataclass
class OddFlower:
    """A server in Flower's place. play: answers a request by hand; asked: what came, whole."""

    url: str = ""
    play: Callable[[BaseHTTPRequestHandler], None] = lambda request: None
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)


def answer(
    body: bytes = b"ok", *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> Callable[[BaseHTTPRequestHandler], None]:
    """Play an answer."""

    def play(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return play


@contextmanager
def odd_flower() -> Iterator[OddFlower]:
    """A running one."""
    flower = OddFlower(play=answer())

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            flower.asked.append((self.command, self.path, headers))
            try:
                flower.play(self)
            except ConnectionError:
                pass  # it was cut off, which is what some tests are about

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = _any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    flower.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield flower
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def real_flower(broker_url: str, folder: Path, *, path: str = "") -> Iterator[str]:
    """Flower as `tuneyard up` starts it; its address, which may end in a path."""
    url = f"http://127.0.0.1:{any_free()}{path}"
    settings = folder / "flower.settings.json"
    settings.write_text(f'{{"broker_url": "{broker_url}", "flower_url": "{url}"}}')
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tuneyard.cli.main", "flower"],
        env={"TUNEYARD_SETTINGS": str(settings), "PATH": "", "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_up() -> bool:
        assert process.poll() is None, "Flower ended"
        try:
            return httpx.get(f"{url}/healthcheck", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up, within_s=30, what="the start of Flower")
        yield url
    finally:
        process.terminate()
        process.wait(10)
