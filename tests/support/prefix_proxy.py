"""A proxy that shows one server under a path prefix: of the two kinds that notebooks have.

One connection, one request: it rewrites the head and then only carries bytes, as they come.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

HEAD_BYTES = 64 * 1024
PIECE_BYTES = 16 * 1024
OURS = (b"host", b"connection", b"x-forwarded-prefix", b"x-forwarded-proto")
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class PrefixProxy:
    """Where it listens, and what it does. targets: what it asked the server for.

    strips: whether the server sees the path without the prefix.
    says: whether it sends X-Forwarded-Prefix.
    """

    server: str
    prefix: str
    strips: bool
    says: bool
    proto: str = ""
    url: str = ""
    targets: list[str] = field(default_factory=list)
    carrying: set[asyncio.Task[None]] = field(default_factory=set)
    taken: list[asyncio.StreamWriter] = field(default_factory=list)

    def take(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        """A connection: its writer is known even where its task is cancelled before it begins."""
        self.taken.append(answer)
        task = asyncio.ensure_future(self.serve(client, answer))
        self.carrying.add(task)  # the loop alone would let it be lost
        task.add_done_callback(self.carrying.discard)

    async def end(self) -> None:
        """Cancel all that goes on, and close all connections."""
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self.taken:
            await close(writer)

    async def serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        """Carry one request there and its answer back."""
        try:
            head = await client.readuntil(b"\r\n\r\n")
            rewritten = self._rewrite(head)
            if rewritten is None:
                answer.write(NOT_FOUND)
            else:
                await self._ask(rewritten, client, answer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # either side may leave when it likes
        finally:
            await close(answer)

    async def _ask(
        self, head: bytes, client: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        parts = urlsplit(self.server)
        there, upstream = await asyncio.open_connection(parts.hostname, parts.port)
        upstream.write(head)
        sending = asyncio.create_task(carry(client, upstream))
        try:
            await carry(there, answer)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await close(upstream)

    def _rewrite(self, head: bytes) -> bytes | None:
        """The head as the server gets it; None for a path outside the prefix."""
        first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        method, target, version = first.split(b" ")
        prefix = self.prefix.encode()
        if not target.startswith(prefix + b"/"):
            return None
        if self.strips:
            target = target.removeprefix(prefix)
        self.targets.append(target.decode("latin-1"))
        kept = [line for line in lines if line.split(b":")[0].strip().lower() not in OURS]
        added = [b"Host: " + urlsplit(self.server).netloc.encode(), b"Connection: close"]
        if self.says:
            added.append(b"X-Forwarded-Prefix: " + prefix)
        if self.proto:
            added.append(b"X-Forwarded-Proto: " + self.proto.encode())
        request = b" ".join((method, target, version))
        return b"\r\n".join([request, *added, *kept, b"", b""])


async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Pass on what comes, at once, to its end."""
    while piece := await source.read(PIECE_BYTES):
        target.write(piece)
        await target.drain()


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection, whatever the other side did to it."""
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


@contextmanager
def prefix_proxy(
    server: str, prefix: str, *, strips: bool, says: bool, proto: str = ""
) -> Iterator[PrefixProxy]:
    """A running proxy on 127.0.0.1; its ``url`` ends in the prefix."""
    proxy = PrefixProxy(server, prefix, strips, says, proto)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(proxy.take, "127.0.0.1", 0, limit=HEAD_BYTES), loop
    ).result(10)
    proxy.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}{prefix}"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(listening.close)
        asyncio.run_coroutine_threadsafe(proxy.end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
