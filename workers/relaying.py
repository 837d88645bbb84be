"""The worker's side of its gateway: bind, start, start again; the address is the same all along."""

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import Settings

log = logging.getLogger(__name__)

GATEWAY_PROGRAM = Path(__file__).with_name("gateway.py")
RESTART_S = 0.5
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class Relay:
    """A node's gateway. The token is of this worker's life; the API reads it in the node's row."""

    listening: socket.socket
    url: str
    token: str
    work: Path

    def start(self, stopping: threading.Event) -> None:
        """Keep a gateway running, in a thread, until this process ends."""
        threading.Thread(target=self._keep, args=(stopping,), name="gateway", daemon=True).start()

    def _keep(self, stopping: threading.Event) -> None:
        while True:
            # Answers that are on their way may leave while the worker stops.
            code = self._run()
            if stopping.wait(RESTART_S):
                return
            log.warning("gateway ended", extra={"event": "gateway_ended", "code": code})

    def _run(self) -> int:
        """Run one to its end. It reads stdin to see that we live: its end is our end."""
        descriptor = self.listening.fileno()
        argv = [sys.executable, "-I", "-S", str(GATEWAY_PROGRAM), str(self.work), str(descriptor)]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, pass_fds=[descriptor], env=_environment(), cwd="/"
        ) as process:
            if process.stdin is not None:
                try:
                    process.stdin.write(f"{self.token}\n".encode())
                    process.stdin.flush()
                except BrokenPipeError:
                    pass  # it ended already: the code says so
            return process.wait()


def open_relay(settings: Settings) -> Relay:
    """Listen, so that the address is known before the gateway is up. Raises: InputError."""
    host, port = settings.gateway_host, settings.gateway_port
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        raise InputError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}.",
            code="port_taken",
            field="gateway_port",
            hint="another process has it, or the address is not this machine's;"
            " TUNEYARD_GATEWAY_PORT=0 takes any free port",
        ) from None
    url = settings.gateway_url or _url(host, listening.getsockname()[1])
    return Relay(listening, url.rstrip("/"), secrets.token_urlsafe(32), settings.home / "work")


def _environment() -> dict[str, str]:
    """What an interpreter may need to start; no secret is among it."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}


def _url(host: str, port: int) -> str:
    """Where the API finds a gateway that listens there."""
    if host in EVERYWHERE:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
