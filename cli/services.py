"""Commands that run Tuneyard itself: one machine's, or one process of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tuneyard.cli.logs import start_logging
from tuneyard.cli.output import duration, print_json, print_table, say
from tuneyard.cli.profile import HomeOption, Json, home_folder
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import PREFIX, READ_BY, Settings, load_settings

RootPath = Annotated[
    str | None,
    typer.Option(metavar="PREFIX", help="Path prefix that a proxy puts before the API's paths."),
]
JsonLogs = Annotated[bool, typer.Option("--json", help="Log a JSON object a line.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    for command in (api, scheduler, worker, flower, migrate):
        app.command(epilog=_settings_of(command.__name__))(command)


def _settings_of(process: str) -> str:
    lines = [
        f"{PREFIX}{name.upper()}: {field.description}"
        for name, field in Settings.model_fields.items()
        if name in READ_BY[process]
    ]
    return "\n\n".join(["Settings, from the environment or a file:", *lines])


def up(
    home: HomeOption = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the API; 0: any free one.")
    ] = None,
    root_path: RootPath = None,
    detach: Annotated[bool, typer.Option(help="Return once all is ready.")] = False,
    json: Json = False,
) -> int:
    """Start PostgreSQL, Valkey, API, scheduler, worker and Flower on this machine.

    Example: tuneyard up --detach
    """
    with installed("local"):
        from tuneyard.local.up import up as start

    return start(home_folder(home), port=port, root_path=root_path, detach=detach, as_json=json)


def down(home: HomeOption = None, json: Json = False) -> None:
    """Stop what `up` started.

    Example: tuneyard down
    """
    with installed("local"):
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
    with installed("local"):
        from tuneyard.local.status import status as look

    found = look(home_folder(home)).as_dict()
    if json:
        print_json(found)
        return
    say(f"{found['phase']}  {found['home']}")
    if found["url"] and found["phase"] != "stopped":
        say(f"  {found['url']}")
        say(f"  {found['url']}/flower/")
    rows = [
        (c["name"], c["pid"], _state(c), duration(c["uptime_s"]), c["restarts"])
        for c in found["children"]
    ]
    if rows:
        print_table(("process", "pid", "state", "for", "restarts"), rows)


def _state(child: dict[str, Any]) -> str:
    return "up" if child["alive"] else "gone"


def api(root_path: RootPath = None, json: JsonLogs = False) -> None:
    """Run the API's process.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_api:…@db/tuneyard tuneyard api
    """
    settings = _settings(as_json=json, root_path=root_path)
    with installed("api"):
        from tuneyard.api.main import run
    run(settings)


def scheduler(json: JsonLogs = False) -> None:
    """Run a scheduler's process; several may run, one leads.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_scheduler:…@db/tuneyard tuneyard scheduler
    """
    settings = _settings(as_json=json)
    with installed("worker"):
        from tuneyard.scheduler.loop import run
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run(settings, stop)


def worker(json: JsonLogs = False) -> None:
    """Run this node's worker.

    Example: TUNEYARD_DATABASE_URL=postgresql://tuneyard_worker:…@db/tuneyard tuneyard worker
    """
    settings = _settings(as_json=json)
    with installed("worker"):
        from tuneyard.workers.main import run
    run(settings)


def flower(json: JsonLogs = False) -> None:
    """Run Flower, read-only, on the broker; where it listens is said by TUNEYARD_FLOWER_URL.

    Whoever reaches it sees every team's tasks: let only the API and administrators reach it.
    Example: TUNEYARD_BROKER_URL=redis://:…@valkey/0 tuneyard flower
    """
    settings = _settings(as_json=json)
    with installed("flower"):
        from tuneyard.local.dashboard import run
    run(settings)


def migrate(json: JsonLogs = False) -> None:
    """Bring the database to the newest schema; running it again changes nothing.

    Example: TUNEYARD_DATABASE_URL=postgresql://owner:…@db/tuneyard tuneyard migrate
    """
    settings = _settings(as_json=json)
    with installed("api"):
        from tuneyard.models.migration import migrate as run
    run(settings)


def _settings(*, as_json: bool, root_path: str | None = None) -> Settings:
    settings = load_settings(root_path=root_path)
    start_logging(settings.log_level, as_json=as_json)
    return settings


@contextmanager
def installed(extra: str) -> Iterator[None]:
    """Name the extra whose packages are not there. Raises: InputError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tuneyard":
            raise
        message = f"This needs {error.name}, which is not installed."
        hint = f"pip install 'tuneyard[{extra}]'"
        raise InputError(message, code="not_installed", hint=hint) from None
