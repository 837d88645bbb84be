"""Asking a runner that listens on a Unix socket, however long the path to its folder is."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def connected(workdir: Path) -> socket.socket:
    """A connection to the runner of a work folder."""
    folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(f"/proc/self/fd/{folder}/serve.sock")
        return connection
    finally:
        os.close(folder)


class Asking:
    """A question that was sent; its lines come one by one."""

    def __init__(self, workdir: Path, path: str, body: Mapping[str, Any] | bytes) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._socket = connected(workdir)
        head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n"
        self._socket.sendall(head.encode() + content)
        self._file = self._socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        self._chunked = False
        while (line := self._file.readline().strip()) != b"":
            self._chunked |= line.lower() == b"transfer-encoding: chunked"

    def chunks(self) -> Iterator[bytes]:
        """What comes, chunk by chunk."""
        if not self._chunked:
            yield self._file.read()
        else:
            while size := int(self._file.readline(), 16):
                yield self._file.read(size)
                self._file.readline()
        self.hang_up()

    def pieces(self) -> Iterator[dict[str, Any]]:
        """The lines, each whole in a chunk of its own."""
        for chunk in self.chunks():
            yield json.loads(chunk)

    def hang_up(self) -> None:
        """Close the connection, in the middle perhaps."""
        self._file.close()
        self._socket.close()


def ask(workdir: Path, content: str = "Who?", **more: Any) -> Asking:
    """Ask one question."""
    return Asking(workdir, "/chat", {"messages": [{"role": "user", "content": content}]} | more)


def text_of(pieces: list[dict[str, Any]]) -> str:
    """The joined deltas."""
    return "".join(piece.get("delta", "") for piece in pieces)
