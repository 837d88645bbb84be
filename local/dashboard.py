"""Flower on the broker of this machine: read-only, on loopback, nothing kept.

    python -P -m tuneyard.local.dashboard     # settings by TUNEYARD_*: broker_url and flower_url

People see it through the API, at /flower, behind its login. A path in flower_url becomes Flower's
url_prefix; the API sets its links right with and without one.

Its own start, because the password of the broker must not stand in a command line, and because
all applications on one broker need the same key prefix and visibility timeout.
"""

import os
import sys
from urllib.parse import urlsplit

from celery import Celery
from flower.views import BaseHandler

from tuneyard.specs.errors import InputError
from tuneyard.specs.messages import TRANSPORT
from tuneyard.specs.settings import Settings, load_settings

MAX_TASKS = 10_000
PURGE_WORKERS_AFTER_S = 3600


def main() -> int:
    """Serve until SIGTERM."""
    try:
        settings = load_settings()
    except InputError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
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
    app.start(["--quiet", "flower", *flower_options(settings)])
    return 0


def _let_no_other_site_read(handler: BaseHandler) -> None:
    handler.set_header("X-Content-Type-Options", "nosniff")


def flower_options(settings: Settings) -> list[str]:
    """Flower's command line; where it listens is said by flower_url."""
    where = urlsplit(settings.flower_url)
    options = {
        "address": where.hostname or "127.0.0.1",
        "port": where.port or 5555,
        "url_prefix": where.path.strip("/"),
        "read_only": True,
        "persistent": False,
        "max_tasks": MAX_TASKS,
        "purge_offline_workers": PURGE_WORKERS_AFTER_S,
        "logging": settings.log_level.lower(),
    }
    return [f"--{name}={value}" for name, value in options.items() if value != ""]


if __name__ == "__main__":
    sys.exit(main())
