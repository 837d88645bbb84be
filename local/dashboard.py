"""Flower on the broker: read-only, nothing kept; on loopback, or where flower_url says.

People see it through the API, at /flower, behind its login. A path in flower_url becomes Flower's
url_prefix; the API sets its links right with and without one.

Its own start (`tuneyard flower`), because the password of the broker must not stand in a command
line, and because all applications on one broker need the same key prefix and visibility timeout.
"""

import errno
import os
import socket
from urllib.parse import urlsplit

from celery import Celery
from flower.views import BaseHandler

from tuneyard.specs.errors import InputError
from tuneyard.specs.messages import TRANSPORT
from tuneyard.specs.settings import Settings

DEFAULT_PORT = 5555
NOT_LISTENED_ON = (errno.EACCES, errno.EADDRINUSE, errno.EADDRNOTAVAIL, socket.EAI_NONAME)
MAX_TASKS = 10_000
PURGE_WORKERS_AFTER_S = 3600


def run(settings: Settings) -> None:
    """Serve until SIGTERM. Raises: InputError when the address cannot be listened on."""
    # Flower's JSON pages show what its HTML pages show; every operation is refused by read_only.
    os.environ["FLOWER_UNAUTHENTICATED_API"] = "true"
    # With that, Flower lets the scripts of every site that a browser visits read its answers.
    BaseHandler.set_default_headers = _let_no_other_site_read
    app = Celery("tuneyard", broker=settings.broker_url.get_secret_value())
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=TRANSPORT,
    )
    try:
        app.start(["--quiet", "flower", *flower_options(settings)])
    except OSError as error:
        if error.errno not in NOT_LISTENED_ON:
            raise
        where = listens_at(settings)
        raise InputError(
            f"{where[0]}:{where[1]} cannot be listened on: {error.strerror}.",
            code="port_taken",
            field="flower_url",
            hint="another process has it, or the address is not this machine's",
        ) from None


def _let_no_other_site_read(handler: BaseHandler) -> None:
    handler.set_header("X-Content-Type-Options", "nosniff")


def flower_options(settings: Settings) -> list[str]:
    """Flower's command line; where it listens is said by flower_url."""
    address, port = listens_at(settings)
    options = {
        "address": address,
        "port": port,
        "url_prefix": urlsplit(settings.flower_url).path.strip("/"),
        "read_only": True,
        "persistent": False,
        "max_tasks": MAX_TASKS,
        "purge_offline_workers": PURGE_WORKERS_AFTER_S,
        "logging": settings.log_level.lower(),
    }
    return [f"--{name}={value}" for name, value in options.items() if value != ""]


def listens_at(settings: Settings) -> tuple[str, int]:
    """Address and port, as flower_url has them."""
    where = urlsplit(settings.flower_url)
    return where.hostname or "127.0.0.1", where.port or DEFAULT_PORT
