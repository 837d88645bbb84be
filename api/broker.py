"""Whether the broker answers: two commands by hand, as its client library takes 0.1 s to import."""

import logging
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, unquote, urlsplit

log = logging.getLogger(__name__)

TIMEOUT_S = 0.5
KNOWN_S = 2.0
DEFAULT_PORT = 6379


class Broker:
    """Asked at most every two seconds; when its answer changes this is said once."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._lock = threading.Lock()
        self._asked_at, self._answered = -KNOWN_S, True

    def answers(self) -> bool:
        """The newest answer."""
        with self._lock:
            if time.monotonic() - self._asked_at >= KNOWN_S:
                self._asked_at = time.monotonic()
                self._note(ping(self._url))
            return self._answered

    def _note(self, answers: bool) -> None:
        if answers != self._answered:
            message = "broker is back" if answers else "broker away: jobs run without hints"
            log.warning(message, extra={"event": "broker_changed"})
        self._answered = answers


def ping(url: SplitResult) -> bool:
    """Log in where the URL has a password, and send PING. Source: the RESP2 specification."""
    commands = [["PING"]]
    if url.password:
        user = [unquote(url.username)] if url.username else []
        commands.insert(0, ["AUTH", *user, unquote(url.password)])
    try:
        with _connect(url) as connection, connection.makefile("rb") as answers:
            connection.sendall(b"".join(map(_encode, commands)))
            lines = [answers.readline(512) for _ in commands]
    except (OSError, ValueError):
        return False
    return all(line.startswith(b"+") for line in lines)


def _connect(url: SplitResult) -> socket.socket:
    address = (url.hostname or "127.0.0.1", url.port or DEFAULT_PORT)
    connection = socket.create_connection(address, timeout=TIMEOUT_S)
    if url.scheme != "rediss":
        return connection
    return ssl.create_default_context().wrap_socket(connection, server_hostname=address[0])


def _encode(command: list[str]) -> bytes:
    words = [word.encode() for word in command]
    parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)]
    return b"".join(parts)
