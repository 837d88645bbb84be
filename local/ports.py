"""TCP ports of this machine: which are free, and which one a server had before."""

import errno
import socket
from contextlib import closing
from pathlib import Path

from tuneyard.specs.errors import InputError


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now. Raises: InputError for an address not of ours."""
    with closing(socket.socket(_family(host))) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise InputError(
                f"Nothing can listen on {host} port {port}: {error.strerror or error}.",
                code="bad_address",
                hint="use 127.0.0.1 (this machine alone) or 0.0.0.0 (every interface)",
            ) from None
    return True


def any_free(host: str = "127.0.0.1") -> int:
    """A port that is free now; the kernel gives out others before it gives this one again."""
    with closing(socket.socket(_family(host))) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def remembered(file: Path, *, preferred: int | None = None) -> int:
    """The port that ``file`` remembers, if still free; else a new one, remembered from now on."""
    for port in (read(file), preferred):
        if port and is_free(port):
            break
    else:
        port = any_free()
    file.write_text(f"{port}\n")
    return port


def read(file: Path) -> int | None:
    """The port that a file remembers, free or not."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
