"""Whether one process of this machine or container is well, as its health check asks."""

from typing import Annotated, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import typer

from tuneyard.cli.output import print_json, say
from tuneyard.cli.profile import Json
from tuneyard.specs.beats import beat_age_s
from tuneyard.specs.errors import Unavailable
from tuneyard.specs.settings import Settings, load_settings

ANSWER_WITHIN_S = 5.0
SILENT_AFTER_S = 60.0
"""A loop turns every few seconds; a database that is away holds it for ten at most."""

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - asked, not bound


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(health)


def health(
    process: Annotated[
        Literal["api", "scheduler", "worker", "flower"], typer.Argument(help="Which process.")
    ],
    json: Json = False,
) -> None:
    """Say whether a process is well; exit code 4 when it is not. It reads that process's settings.

    Example: tuneyard health worker
    """
    settings = load_settings()
    if process == "api":
        found = _answers(_url(settings.api_host, settings.api_port, "/readyz"))
    elif process == "flower":
        found = _answers(_flower_url(settings))
    else:
        found = _beats(settings, process)
    if json:
        print_json({"process": process, "status": "ok", "found": found})
    else:
        say(f"{process} is well: {found}")


def _answers(url: str) -> str:
    try:
        with urlopen(url, timeout=ANSWER_WITHIN_S) as answer:  # noqa: S310 - http, our own
            return f"{url} answers {answer.status}"
    except HTTPError as error:
        error.close()  # it is the answer, with its connection
        raise Unavailable(f"{url} answers {error.code}.", code="unwell") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"{url} does not answer: {reason}.", code="unwell") from None


def _beats(settings: Settings, process: str) -> str:
    age_s = beat_age_s(settings, process)
    if age_s is None:
        raise Unavailable(
            f"No {process} has run with the home {settings.home}.",
            code="unwell",
            hint="TUNEYARD_HOME must be the one of that process, and writable for it",
        )
    if age_s > SILENT_AFTER_S:
        raise Unavailable(f"The {process} has been silent for {age_s:.0f} s.", code="unwell")
    return f"its loop turned {age_s:.0f} s ago"


def _flower_url(settings: Settings) -> str:
    where = urlsplit(settings.flower_url or "http://127.0.0.1:5555")
    return _url(where.hostname or "", where.port or 5555, f"{where.path.rstrip('/')}/healthcheck")


def _url(host: str, port: int, path: str) -> str:
    host = EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"
