"""A node's gateway: it passes requests on to the runners that listen in their work folders.

    python -I -S gateway.py WORK FD          # the token is the first line of stdin

    POST /attempts/attempt_…/chat            -> /chat of WORK/attempt_…/serve.sock
    POST /attempts/attempt_…/drain           -> /drain of the same

The standard library alone, so that it is up in some 60 ms; it imports nothing of ours and knows
neither jobs nor teams: whoever has the token (the API) decides who may ask what. FD is a
listening socket that the worker bound. A connection carries one request; after its head was
checked, bytes go both ways unread, and whichever side hangs up ends the other: a client that goes
away cancels its answer. It ends with its worker, which holds the other end of stdin.
"""

import asyncio
import hmac
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Coroutine

SOCKET = "serve.sock"
PLACE = re.compile(r"/attempts/(attempt_[0-9a-f]{32})/(chat|drain)")
MAX_HEAD_BYTES = 16 * 1024
HEAD_WITHIN_S = 10.0
CONNECT_WITHIN_S = 5.0
MAX_CONNECTIONS = 256
PIECE_BYTES = 64 * 1024
PASSED_ON = ("content-length", "content-type")
REASONS = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 502: "Bad Gateway",
           503: "Service Unavailable"}  # fmt: skip


class Refusal(Exception):
    """What is answered instead of passing a request on."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def answer(self) -> bytes:
        """The whole answer."""
        error = {"code": self.code, "message": self.message,
                 "field": None, "line": None, "hint": None}  # fmt: skip
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {self.status} {REASONS[self.status]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


class Gateway:
    """All connections of one node."""

    def __init__(self, work: str, token: str) -> None:
        self.work, self.token = work, token
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its head to whoever hangs up first."""
        self.open += 1
        try:
            if self.open > MAX_CONNECTIONS:
                raise Refusal(503, "gateway_busy", "Too many requests at once.")
            await self.pass_on(reader, writer)
        except Refusal as refusal:
            writer.write(refusal.answer())
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it hung up before it had asked anything
        finally:
            self.open -= 1
            await close(writer)

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Check the head, connect to the runner, let the bytes through."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_WITHIN_S)
        except asyncio.LimitOverrunError:
            raise Refusal(400, "bad_request", "The head is too long.") from None
        attempt, place, headers = self.read_head(head)
        inward, outward = await self.connect(attempt)
        try:
            kept = "".join(f"{name}: {headers[name]}\r\n" for name in PASSED_ON if name in headers)
            start = f"POST /{place} HTTP/1.1\r\nHost: runner\r\n{kept}Connection: close\r\n\r\n"
            outward.write(start.encode("latin-1"))
            await either(let_through(reader, outward), let_through(inward, writer))
        finally:
            await close(outward)

    def read_head(self, head: bytes) -> tuple[str, str, dict[str, str]]:
        """Attempt, place and headers. Raises: Refusal."""
        start, *lines = head.decode("latin-1").split("\r\n")[:-2]
        named = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in named}
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refusal(401, "unauthenticated", "This token is not the gateway's.")
        method, _, rest = start.partition(" ")
        found = PLACE.fullmatch(rest.rpartition(" ")[0])
        if method != "POST" or found is None:
            raise Refusal(404, "not_found", "There is nothing at this address.")
        return found.group(1), found.group(2), headers

    async def connect(self, attempt: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The runner's socket, through its folder's descriptor: its path may be too long."""
        try:
            folder = os.open(os.path.join(self.work, attempt), os.O_RDONLY | os.O_DIRECTORY)
            try:
                path = f"/proc/self/fd/{folder}/{SOCKET}"
                return await asyncio.wait_for(asyncio.open_unix_connection(path), CONNECT_WITHIN_S)
            finally:
                os.close(folder)
        except (OSError, TimeoutError):
            raise Refusal(502, "runner_away", "The model's process does not answer.") from None


async def let_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on as they come, at the pace of who reads them, until one side hangs up."""
    try:
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass


async def either(*ways: Coroutine[object, object, None]) -> None:
    """Until one of them is over."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def close(writer: asyncio.StreamWriter) -> None:
    """Close after what was written has gone out."""
    try:
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass


async def main() -> None:
    """Serve until the worker is gone."""
    work, descriptor = sys.argv[1:]
    gateway = Gateway(work, sys.stdin.readline().strip())
    listening = socket.socket(fileno=int(descriptor))
    await asyncio.start_server(gateway.serve, sock=listening, limit=MAX_HEAD_BYTES)
    # What waits for the worker must not keep the process alive: it ends below, whatever is open.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C is the worker's: its end is ours
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(main())
