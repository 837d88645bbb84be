"""Commands that run Tuneyard itself: one machine's, or one process of it."""

import logging
import signal
import sys
import threading
from typing import Annotated, Any

import typer

from tuneyard.cli.output import duration, print_json, print_table, say
from tuneyard.cli.profile import HomeOption, Json, home_folder
from tuneyard.specs.settings import PREFIX, Settings, load_settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    listed = "\n\n".join(
        f"{PREFIX}{name.upper()}: {field.description}"
        for name, field in Settings.model_fields.items()
    )
    for command in (api, scheduler, worker, migrate):
        app.command(epilog="Settings, from the environment or a file:\n\n" + listed)(command)


def up(
    home: HomeOption = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0: any free one.")] = None,
    detach: Annotated[bool, typer.Option(help="Return once all is ready.")] = False,
    json: Json = False,
) -> int:
    """Start PostgreSQL, Valkey, API, scheduler, worker and Flower on this machine.

    Example: tuneyard up --detach
    """
    from tuneyard.local.up import up as start

    return start(home_folder(home), port=port, detach=detach, as_json=json)


def down(home: HomeOption = None, json: Json = False) -> None:
    """Stop what `up` started.

    Example: tuneyard down
    """
    from tuneyard.local.down import down as stop

    stopped = stop(home_folder(home))
    if json:
        print_json({"stopped": stopped})
    else:
        say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def status(home: HomeOption = None, json: Json = False) -> None:
    """Show what runs on this machine.

    Example: tuneyard status
    """
    from tuneyard.local.status import status as look

    found = look(home_folder(home)).as_dict()
    if json:
        print_json(found)
        return
    say(f"{found['phase']}  {found['home']}")
    for name in ("url", "flower_url"):
        if found[name]:
            say(f"  {found[name]}")
    rows = [
        (c["name"], c["pid"], _state(c), duration(c["uptime_s"]), c["restarts"])
        for c in found["children"]
    ]
    if rows:
        print_table(("process", "pid", "state", "for", "restarts"), rows)


def _state(child: dict[str, Any]) -> str:
    return "up" if child["alive"] else "gone"


def api() -> None:
    """Run the API's process.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_api:…@db/tuneyard tuneyard api
    """
    from tuneyard.api.main import run

    run(_settings())


def scheduler() -> None:
    """Run a scheduler's process; several may run, one leads.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_scheduler:…@db/tuneyard tuneyard scheduler
    """
    from tuneyard.scheduler.loop import run

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run(_settings(), stop)


def worker() -> None:
    """Run this node's worker.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_worker:…@db/tuneyard tuneyard worker
    """
    from tuneyard.workers.main import run

    run(_settings())


def migrate() -> None:
    """Bring the database to the newest schema; running it again changes nothing.

    Example: TUNEYARD_DATABASE_URL=postgresql://owner:…@db/tuneyard tuneyard migrate
    """
    from tuneyard.models.migration import migrate as run

    run(_settings())


def _settings() -> Settings:
    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s%(fields)s",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_with_fields)
    return settings


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "fields", "data"}


def _with_fields(record: logging.LogRecord) -> bool:
    """Show what `extra` added, as name=value, behind the sentence."""
    extra = {k: v for k, v in vars(record).items() if k not in _STANDARD and k != "event"}
    shown = " ".join(f"{name}={value}" for name, value in extra.items())
    record.fields = f" [{shown}]" if shown and "event" in vars(record) else ""
    return True
