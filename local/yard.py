"""What `tuneyard up` runs: the children of one home, with their ports, secrets and settings."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pydantic import SecretStr

from tuneyard.local import ports
from tuneyard.local.children import Child
from tuneyard.local.credentials import secret, write_private
from tuneyard.local.home import Home
from tuneyard.local.postgres import STOP_SIGNAL as POSTGRES_STOPS_BY
from tuneyard.local.postgres import STOP_WITHIN_S as POSTGRES_STOPS_WITHIN_S
from tuneyard.local.postgres import PostgresPlan, prepare_postgres
from tuneyard.local.processes import ProcessId
from tuneyard.local.supervisor import find_running
from tuneyard.local.valkey import ValkeyPlan, prepare_valkey
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import PREFIX, Settings

DATABASE = "tuneyard"
ROLES = ("api", "worker", "scheduler")
FLOWER_PORT = 5555
PROBE_TIMEOUT_S = 1.0
PUBLISHED_WITHIN_S = 30.0
"""A worker's time to publish what stopped runners saved, after their own grace."""

COMMAND = (sys.executable, "-P", "-m", "tuneyard.cli.main")


@dataclass(frozen=True)
class Yard:
    """All that one home runs, and what people are told of it."""

    children: tuple[Child, ...]
    url: str
    flower_url: str
    api_key: str = field(repr=False)
    notices: tuple[str, ...] = ()

    def profile(self, home: Home) -> dict[str, str]:
        """What the command line reads, and `up --json` prints."""
        return {
            "url": self.url,
            "api_key": self.api_key,
            "flower_url": self.flower_url,
            "home": str(home.root),
        }


def lay_out(home: Home, settings: Settings) -> Yard:
    """Choose ports, make secrets and the database's cluster, write every child's settings.

    settings: those that ``up`` was given; what is set in them is passed on to the children.
    Raises: InputError when a port is taken or a server cannot be prepared.
    """
    api_port, notices = choose_api_port(home, settings)
    postgres = prepare_postgres(
        home.root / "postgres", port=_port_in_use(home, "postgres"), database=DATABASE
    )
    valkey = prepare_valkey(home.root / "valkey", port=_port_in_use(home, "valkey"))
    url = _url(settings.api_host, api_port)
    flower_url = _url("127.0.0.1", _flower_port(home))
    shared = _passed_on(settings) | {
        "home": str(home.root),
        "broker_url": valkey.url(),
        "api_port": api_port,
        "flower_url": flower_url,
    }
    api_key = secret(home.secret("api_key"), prefix="ty-")
    children = (
        *_servers(postgres, valkey),
        _migrate(home, shared, postgres, api_key),
        *_services(home, shared, postgres, settings, url=url, api_key=api_key),
        _flower(home, shared, flower_url),
    )
    return Yard(children, url, flower_url, api_key, notices)


def choose_api_port(home: Home, settings: Settings) -> tuple[int, tuple[str, ...]]:
    """The API's port and what to say of it: the one asked for, the last one, or a free one.

    Raises: InputError when the one asked for is taken by another program.
    """
    file, host, asked = home.run("api.port"), settings.api_host, settings.api_port
    before = ports.read(file)
    strict = asked != 0 and "api_port" in settings.model_fields_set
    wanted = asked if strict or before is None else before
    ours = wanted == before and find_running(home, "api") is not None
    notices: tuple[str, ...] = ()
    if wanted and (ours or ports.is_free(wanted, host)):
        port = wanted
    elif strict:
        raise InputError(
            f"Port {wanted} of {host} is taken by another program.",
            code="port_taken",
            field="port",
            hint="--port picks another, --port 0 any free one",
        )
    else:
        port = ports.any_free(host)
        if wanted:
            notices = (f"Port {wanted} is taken by another program; the API listens on {port}.",)
    file.write_text(f"{port}\n")
    return port, notices


def answers(*urls: str, key: str = "") -> Callable[[ProcessId], bool]:
    """A probe: whether all URLs answer 200 to who holds the key.

    Another program's server may listen on a port that was free a moment ago: it knows no key of
    ours.
    """
    asked = [Request(url, headers={"Authorization": f"Bearer {key}"}) for url in urls]  # noqa: S310

    def probe(process: ProcessId) -> bool:
        return process.alive and all(map(_answers, asked))

    return probe


def _answers(request: Request) -> bool:
    try:
        with urlopen(request, timeout=PROBE_TIMEOUT_S) as answer:  # noqa: S310 - http, our own
            return bool(answer.status == 200)
    except HTTPError as refused:
        refused.close()  # it is the answer, with its connection
        return False
    except OSError:
        return False


def child_environment() -> dict[str, str]:
    """What children keep of ours: all but settings, which reach them by file."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def _servers(postgres: PostgresPlan, valkey: ValkeyPlan) -> tuple[Child, Child]:
    return (
        Child(
            "postgres",
            postgres.argv,
            postgres.env,
            is_ready=postgres.is_ready,
            stop_signal=POSTGRES_STOPS_BY,
            stop_within_s=POSTGRES_STOPS_WITHIN_S,
        ),
        Child("valkey", valkey.argv, valkey.env, is_ready=valkey.is_ready),
    )


def _migrate(home: Home, shared: dict[str, Any], postgres: PostgresPlan, api_key: str) -> Child:
    """The only one that knows the owner of the tables, and all passwords."""
    values = {f"{role}_role_password": secret(home.secret(role)) for role in ROLES}
    values |= {"database_url": postgres.url(database=DATABASE), "first_api_key": api_key}
    return _own_child(home, "migrate", shared | values, stage=1, once=True)


def _services(
    home: Home,
    shared: dict[str, Any],
    postgres: PostgresPlan,
    settings: Settings,
    *,
    url: str,
    api_key: str,
) -> list[Child]:
    """API, scheduler and worker, each with a role of its own; the store is not the scheduler's."""
    keys = _store_keys(settings)
    particular: dict[str, dict[str, Any]] = {
        "api": {"is_ready": answers(f"{url}/readyz", f"{url}/api/v1/nodes", key=api_key)},
        "scheduler": {},
        "worker": {"stop_within_s": settings.stop_grace_s + PUBLISHED_WITHIN_S},
    }
    known = {"api": {"session_secret": secret(home.secret("session"))}}
    return [
        _own_child(
            home,
            role,
            shared
            | {"database_url": _role_url(home, postgres, role)}
            | (keys if role != "scheduler" else {})
            | known.get(role, {}),
            stage=2,
            **more,
        )
        for role, more in particular.items()
    ]


def _flower(home: Home, shared: Mapping[str, Any], flower_url: str) -> Child:
    return _own_child(
        home,
        "flower",
        {name: shared[name] for name in ("home", "broker_url", "flower_url")},
        stage=2,
        is_ready=answers(f"{flower_url}/healthcheck"),
    )


def _role_url(home: Home, postgres: PostgresPlan, role: str) -> str:
    return postgres.url(f"tuneyard_{role}", secret(home.secret(role)), DATABASE)


def _own_child(home: Home, name: str, values: Mapping[str, Any], **more: Any) -> Child:
    """A process of ours: its settings lie in a file of its own, mode 0600."""
    file = home.run(f"{name}.settings.json")
    text = json.dumps(values, sort_keys=True)
    write_private(file, text + "\n")
    env = child_environment() | {PREFIX + "SETTINGS": str(file)}
    return Child(name, (*COMMAND, name), env, settings=text, **more)


def _passed_on(settings: Settings) -> dict[str, Any]:
    """The settings that ``up`` was given, as a file holds them; secrets it makes itself."""
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    return {
        name: value
        for name, value in given.items()
        if not isinstance(getattr(settings, name), SecretStr)
    }


def _store_keys(settings: Settings) -> dict[str, str]:
    keys = {name: getattr(settings, name) for name in ("store_access_key", "store_secret_key")}
    return {name: key.get_secret_value() for name, key in keys.items() if key is not None}


def _flower_port(home: Home) -> int:
    file = home.run("flower.port")
    return _port_in_use(home, "flower") or ports.remembered(file, preferred=FLOWER_PORT)


def _port_in_use(home: Home, child: str) -> int | None:
    """The port of a server that still runs from before."""
    if find_running(home, child) is None:
        return None
    folder = home.root / child
    return ports.read(folder / "port" if folder.is_dir() else home.run(f"{child}.port"))


def _url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens there."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
