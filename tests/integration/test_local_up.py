"""`tuneyard up` with the real PostgreSQL, Valkey and Flower; our own commands have stand-ins."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from tuneyard.local import processes
from tuneyard.local.down import down
from tuneyard.local.home import Home
from tuneyard.local.status import status
from tuneyard.local.up import up
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import Settings, load_settings

WITHIN_S = 30.0

PROGRAM = """
import sys
from tuneyard.local import yard
from tuneyard.local.__main__ import main
yard.COMMAND = (sys.executable, "-P", sys.argv[1])
sys.exit(main(sys.argv[2]))
"""

STAND_IN = """
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from tuneyard.specs.settings import load_settings

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

settings = load_settings()
if sys.argv[1] == "migrate":
    sys.exit(0)
if sys.argv[1] == "flower":
    from tuneyard.cli.main import main
    main()
if sys.argv[1] == "api":
    HTTPServer((settings.api_host, settings.api_port), Ready).serve_forever()
while True:
    signal.pause()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    for name, text in (("program.py", PROGRAM), ("command.py", STAND_IN)):
        (tmp_path / name).write_text(text)
    return [sys.executable, "-P", str(tmp_path / "program.py"), str(tmp_path / "command.py")]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A path with spaces, and much longer than a Unix socket's may be."""
    root = tmp_path / ("a long home " * 10) / ("of somebody " * 8)
    yield Home(root)
    down(root)
    assert status(root).phase == "stopped"


@pytest.fixture
def environ() -> dict[str, str]:
    plain = {name: text for name, text in os.environ.items() if not name.startswith("TUNEYARD_")}
    keys = {"TUNEYARD_STORE_ACCESS_KEY": "who", "TUNEYARD_STORE_SECRET_KEY": "the-stores"}
    more = {"TUNEYARD_LEASE_S": "7", "TUNEYARD_FAKE_GPUS": "2", "TUNEYARD_API_KEY": "mine"}
    return plain | keys | more


def settings_of(home: Home, child: str) -> Settings:
    return load_settings({"TUNEYARD_SETTINGS": str(home.run(f"{child}.settings.json"))})


def pids(home: Home) -> dict[str, int]:
    return {each.name: each.pid for each in status(home.root).children if each.alive}


def eventually(ask: Callable[[], bool]) -> None:
    assert processes.wait_until(ask, within_s=WITHIN_S), "it did not happen in time"


def superuser_url(home: Home) -> str:
    return settings_of(home, "migrate").database_url.get_secret_value()


def answers_sql(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            return connection.execute("SELECT current_database()").fetchone() == ("tuneyard",)
    except psycopg.OperationalError:
        return False


def answers_ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def test_one_home_from_up_to_down(
    home: Home, program: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"port": 0, "root_path": "/proxy/8800", "detach": True}
    up(home.root, **asked, as_json=True, environ=environ, program=program)  # type: ignore[arg-type]
    profile = json.loads(capsys.readouterr().out)
    assert set(pids(home)) == {"postgres", "valkey", "api", "scheduler", "worker", "flower"}

    api, worker, migrate = (settings_of(home, name) for name in ("api", "worker", "migrate"))
    assert (api.lease_s, worker.fake_gpus, worker.home) == (7.0, 2, home.root)
    assert profile["url"] == f"http://127.0.0.1:{api.api_port}"
    assert migrate.first_api_key is not None
    assert migrate.first_api_key.get_secret_value() == profile["api_key"]
    assert "//tuneyard_worker:" in worker.database_url.get_secret_value()
    assert api.session_secret is not None
    assert (worker.session_secret, api.flower_url) == (None, profile["flower_url"])
    known_to = {
        name
        for name in ("api", "worker", "scheduler", "migrate", "flower")
        if "the-stores" in home.run(f"{name}.settings.json").read_text()
    }
    assert known_to == {"api", "worker"}
    assert "_password" not in home.run("worker.settings.json").read_text()
    assert migrate.database_url.get_secret_value() not in home.run("api.settings.json").read_text()

    flower = profile["flower_url"]
    assert httpx.get(flower + "/workers").status_code == 200
    assert httpx.get(flower + "/api/workers").status_code == 200
    assert httpx.post(flower + "/api/worker/shutdown/any").status_code == 403
    assert api.root_path == "/proxy/8800"

    secrets = [file.read_text().strip() for file in (home.root / "secrets").iterdir()]
    secrets += [
        (home.root / name / "password").read_text().strip() for name in ("postgres", "valkey")
    ]
    for pid in pids(home).values():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [secret for secret in secrets if secret in command]

    before, valkey_url = pids(home), api.broker_url.get_secret_value()
    for name in ("postgres", "valkey"):
        os.kill(before[name], signal.SIGKILL)
    eventually(lambda: answers_sql(superuser_url(home)))  # on the port that clients know
    eventually(lambda: answers_ping(valkey_url))
    after = pids(home)
    assert {name for name in before if after[name] != before[name]} == {"postgres", "valkey"}

    supervisor = home.holder()
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    processes.wait_gone(supervisor, within_s=WITHIN_S)
    up(home.root, **asked, environ=environ, program=program)  # type: ignore[arg-type]
    assert f"Flower    {profile['url']}/flower/\n" in capsys.readouterr().out
    assert pids(home) == after
    assert json.loads(home.profile.read_text()) == profile

    assert set(down(home.root)) == set(after)
    assert pids(home) == {}


def test_an_address_of_another_machine_is_refused_and_nothing_is_left(
    home: Home, program: list[str], environ: dict[str, str]
) -> None:
    with pytest.raises(InputError, match="Nothing can listen") as caught:
        up(
            home.root,
            detach=True,
            environ=environ | {"TUNEYARD_API_HOST": "192.0.2.1"},
            program=program,
        )
    assert caught.value.code == "bad_address"
    assert pids(home) == {}


@pytest.mark.parametrize(("name", "value"), [("lease_s", "soon"), ("root_path", "//evil")])
def test_a_wrong_setting_is_said_at_once(
    home: Home, program: list[str], name: str, value: str
) -> None:
    with pytest.raises(InputError, match=name):
        up(home.root, detach=True, environ={f"TUNEYARD_{name.upper()}": value}, program=program)
    assert home.holder() is None
