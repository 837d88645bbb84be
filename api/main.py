"""The API's process."""

import logging
import socket

import uvicorn

from tuneyard.api.app import create_app
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import Settings

log = logging.getLogger(__name__)

END_STREAMS_WITHIN_S = 3


def run(settings: Settings) -> None:
    """Serve until SIGTERM. Raises: InputError when the address cannot be listened on."""
    listening = bind(settings.api_host, settings.api_port)
    config = uvicorn.Config(
        create_app(settings),
        log_level=settings.log_level.lower(),
        access_log=False,
        timeout_graceful_shutdown=END_STREAMS_WITHIN_S,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )
    log.info("api listens", extra={"event": "api_listens", "port": listening.getsockname()[1]})
    uvicorn.Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: InputError port_taken, bad_address."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            code="port_taken",
            field="api_port",
            hint="another process has it, or the address is not this machine's",
        ) from None
    return listening
