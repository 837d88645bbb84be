"""The API's process."""

import logging
import signal
import socket
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tuneyard.api.app import create_app
from tuneyard.api.limits import HeadersTooLarge
from tuneyard.api.streams import Streams
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import Settings

log = logging.getLogger(__name__)

END_WITHIN_S = 10
"""Requests that are being answered at SIGTERM have so long; streams end at once."""

MAX_HEAD_BYTES = 256 * 1024
"""Above, the connection is cut; below, limits.py says what is too long."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM. Raises: InputError when the address cannot be listened on."""
    with bind(settings.api_host, settings.api_port) as listening:
        server = Server(create_app(settings))
        port = listening.getsockname()[1]
        log.info("api listens", extra={"event": "api_listens", "port": port})
        server.run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: InputError port_taken, bad_address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off for sockets that say they are TCP, and for no others: without
    # the protocol's number each answer takes 40 ms more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)  # REUSEADDR alone lets two sockets bind: the second fails here
    except OSError as error:
        listening.close()
        raise InputError(
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            code="port_taken",
            field="api_port",
            hint="another process has it, or the address is not this machine's",
        ) from None
    return listening


class Server(uvicorn.Server):
    """uvicorn as we run it; it ends streams at the signal instead of waiting for them first."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # prefix.py heeds them, and must see who really asks
            timeout_graceful_shutdown=END_WITHIN_S,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._streams: Streams = app.state.streams

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: end in good order, with exit code 0; a second SIGINT does not wait."""
        self._streams.end_all()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class Protocol(H11Protocol):
    """HTTP whose answers to what is no request have our one shape of errors."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read as a request; the head's size is the usual reason."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        problem = InputError(msg, code="bad_request")
        status = 400
        if len(self.conn.trailing_data[0]) >= MAX_HEAD_BYTES:
            problem = HeadersTooLarge(hint=f"at most {MAX_HEAD_BYTES} bytes before the body")
            status = HeadersTooLarge.http_status
        answer = JSONResponse({"error": problem.as_dict()}, status)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        event = h11.Response(status_code=status, headers=headers)
        for part in (event, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()
