"""What docker-compose.yml says, started by hand: its commands, settings and secrets, on two nodes.

Containers give addresses, users and mounts; here 127.0.0.1 and folders stand for them. PostgreSQL
and Valkey are servers of their own, reached by the URLs that docker/secrets.sh wrote.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from support.clusters import FAKE_RUNNER
from support.compose import FIRST, ROOT, SECOND, config, dockerfile, image_environment, seconds
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.yards import wait_for

from tuneyard.local import ports, postgres, processes, valkey
from tuneyard.local.postgres import RunningPostgres, start_postgres
from tuneyard.models.engine import Database
from tuneyard.workers.guarding import marked_attempts

HASTE = {
    "DISK_FLOOR_BYTES": 0,
    "FAKE_GPUS": 2,
    "GATEWAY_PORT": 0,
    "LEASE_S": 10,
    "NODE_ROOTS": "/",
    "POLL_S": 0.5,
    "TICK_S": 0.1,
}
"""Not in the files: a runner that hashes on pretended GPUs, and shorter pauses."""

PROGRAMS = Path(os.environ.get("PROGRAMS") or Path(sys.executable).parent)
"""Where the commands are: here, or in an environment of an image's packages (tests/wheel)."""

EVERYWHERE = "0.0.0.0"  # noqa: S104 - replaced, not bound
FLOWER = f"{EVERYWHERE}:5555"
STEPS = 100


@dataclass
class Servers:
    """The services of the compose files as processes on this machine."""

    folder: Path
    addresses: Mapping[str, str]
    services: dict[str, dict[str, Any]]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service of ours as its container does."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.argv(self.services[name]["command"]),
                env=self.environment(name),
                cwd="/",
                stdout=log,
                stderr=log,
            )
        self.running[name] = process
        return process

    def argv(self, command: list[str]) -> list[str]:
        """The image's entry point and the service's command."""
        (entry,) = dockerfile()["api"].words("ENTRYPOINT")
        return [str(PROGRAMS / entry), *command]

    def environment(self, name: str) -> dict[str, str]:
        """The image's environment and the service's, with addresses and folders of this machine."""
        service = self.services[name]
        given = image_environment(service.get("build", {}).get("target", "api"))
        given |= service["environment"]
        found = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")}
        found |= {key: self.here(str(value)) for key, value in given.items() if key != "PATH"}
        found |= {f"TUNEYARD_{key}": str(value) for key, value in HASTE.items()}
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        return found | {"TUNEYARD_HOME": str(home), "TUNEYARD_RUNNER_PYTHON": str(FAKE_RUNNER)}

    def here(self, text: str) -> str:
        """A value of a compose file with this machine's addresses and folders."""
        for there, mine in self.addresses.items():
            text = text.replace(there, mine)
        return text

    def check_health(self, name: str) -> str:
        """Run a service's health check; what it complains of."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        check = subprocess.run(
            self.argv(words[1:]), env=self.environment(name), capture_output=True, text=True
        )
        return check.stderr if check.returncode else ""

    def unwell(self) -> list[str]:
        """Who is not up, as the health checks ask, but without an interpreter for each look."""
        loops = {"scheduler": "scheduler", "worker": "worker", "second-worker": "worker"}
        pages = {
            "api": f"http://127.0.0.1:{self.addresses['8800']}/readyz",
            "flower": f"http://{self.addresses[FLOWER]}/healthcheck",
        }
        beats = {name: self.folder / f"home-{name}" / f"{loops[name]}.beat" for name in loops}
        silent = [name for name, file in beats.items() if not file.exists()]
        return silent + [name for name, page in pages.items() if not _answers(page)]

    def stop(self, name: str) -> float:
        """SIGTERM; the seconds that it took. It must end with 0 within its grace period."""
        process, began = self.running.pop(name), time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(seconds(self.services[name]["stop_grace_period"])) == 0, name
        return time.monotonic() - began

    @property
    def http(self) -> httpx.Client:
        """A client with the first key."""
        key = (self.folder / "secrets" / "first_api_key").read_text().strip()
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.addresses['8800']}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=20,
        )

    def submit(self, **asked: object) -> str:
        """A job of the hashing runner on a GPU; its id."""
        source = f"node:/{json.dumps(asked)}"
        name = f"m-{uuid4().hex}"  # each source a name of its own
        job = {"kind": "download", "model_name": name, "source": source, "device": "gpu"}
        with self.http as http:
            answer = http.post("/jobs", json=job)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job: str) -> dict[str, Any]:
        """A job as the API shows it."""
        with self.http as http:
            found: dict[str, Any] = http.get(f"/jobs/{job}").json()
        return found

    def finish(self, job: str) -> None:
        """Wait for a job's end, which must be a good one."""
        ends = ("succeeded", "failed", "cancelled")
        wait_for(lambda: self.job(job)["state"] in ends, within_s=60, what=f"the end of {job}")
        assert self.job(job)["state"] == "succeeded", self.job(job)

    def steps(self, job: str) -> list[int]:
        """Every step that was computed, in whichever attempt."""
        with self.http as http:
            metrics = http.get(f"/jobs/{job}/metrics", params={"limit": 1000}).json()["data"]
        return [each["step"] for each in metrics]

    def artifacts(self, job: str) -> list[dict[str, Any]]:
        """What a job brought forth so far."""
        with self.http as http:
            found: list[dict[str, Any]] = http.get(f"/jobs/{job}/artifacts").json()["data"]
        return found


def _answers(page: str) -> bool:
    try:
        return httpx.get(page, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers") / "secrets"
    script = ROOT / "docker" / "secrets.sh"
    subprocess.run(["sh", str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, secrets: Path) -> Iterator[RunningPostgres]:
    """What the image postgres makes of its environment: a superuser and a database."""
    home = tmp_path_factory.mktemp("postgres")
    home.chmod(0o755)
    asked = config(*FIRST)["services"]["postgres"]["environment"]
    server = start_postgres(home / "postgres", fsync=False, die_with_parent=True)
    password = (secrets / Path(asked["POSTGRES_PASSWORD_FILE"]).name).read_text().strip()
    user, name = asked["POSTGRES_USER"], asked["POSTGRES_DB"]
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{password}'".encode())
        connection.execute(f"CREATE DATABASE {name} OWNER {user}".encode())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, secrets: Path) -> Iterator[int]:
    """Valkey as docker-compose.yml starts it, with the file of its secret; its port."""
    port = ports.any_free("127.0.0.1")
    program, conf = config(*FIRST)["services"]["valkey"]["command"]
    server = valkey.binary()
    assert server.name == program
    home = tmp_path_factory.mktemp("valkey")
    argv = [str(server), str(secrets / Path(conf).name), "--port", str(port)]
    with subprocess.Popen(
        [*argv, "--bind", "127.0.0.1", "--dir", str(home)], stdout=subprocess.DEVNULL
    ) as process:
        yield port
        process.terminate()


@pytest.fixture(scope="module")
def servers(secrets: Path, database: RunningPostgres, broker: int) -> Iterator[Servers]:
    """All of ours up and well, on two nodes."""
    folder = secrets.parent
    address = {"postgres:5432": database.plan.port, "valkey:6379": broker}
    for file in secrets.glob("*_url"):
        text = file.read_text()
        for there, port in address.items():
            text = text.replace(there, f"127.0.0.1:{port}")
        file.unlink()  # its mode lets nobody write it
        file.write_text(text)
    first = config(*FIRST)["services"]
    second = config(*SECOND, TUNEYARD_NODE_NAME="node-2", TUNEYARD_STORE="store")["services"]
    api, flower = (ports.any_free("127.0.0.1") for _ in range(2))
    ours = Servers(
        folder,
        {
            "/run/secrets": str(secrets),
            "/store": str(folder / "store"),
            FLOWER: f"127.0.0.1:{flower}",
            EVERYWHERE: "127.0.0.1",
            "8800": str(api),
        },
        first | {"second-worker": second["worker"]},
    )
    try:
        for _ in range(2):  # running it again changes nothing
            assert ours.start("migrate").wait(60) == 0
        del ours.running["migrate"]
        for name in ("api", "scheduler", "flower", "worker", "second-worker"):
            ours.start(name)
        assert processes.wait_until(lambda: not ours.unwell(), within_s=60), ours.unwell()
        complaints = [said for name in ours.running if (said := ours.check_health(name))]
        assert complaints == []
        yield ours
    finally:
        for process in ours.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def records(database: RunningPostgres) -> Iterator[TestDatabase]:
    """The database as its owner sees it."""
    owner = Database(database.plan.url(database="tuneyard"), "test-owner")
    yield TestDatabase(database, "tuneyard", owner, owner, owner, owner)
    owner.close()


def test_database_and_broker_are_found_well_by_their_health_checks_and_can_be_dumped(
    servers: Servers, database: RunningPostgres, broker: int
) -> None:
    pg = servers.services["postgres"]["healthcheck"]["test"][1:]
    found = [str(postgres.binary(pg[0])), f"--port={database.plan.port}", *pg[1:]]
    assert subprocess.run(found, check=False).returncode == 0
    page = (ROOT / "docs" / "howto" / "servers.md").read_text()
    (line,) = (line for line in page.splitlines() if "pg_dump" in line)
    words = shlex.split(line[line.index("pg_dump") : line.index(" > ")])
    address = ["--host=127.0.0.1", f"--port={database.plan.port}"]
    password = (servers.folder / "secrets" / "owner_password").read_text().strip()
    dump = subprocess.run(
        [str(postgres.binary(words[0])), *address, *words[1:]],
        env={"PGPASSWORD": password},
        capture_output=True,
        check=True,
    )
    assert dump.stdout.startswith(b"PGDMP")
    kind, script = servers.services["valkey"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    script = servers.here(script).replace("$$", "$")
    programs = f"{valkey.binary().parent}:{os.environ['PATH']}"
    for port, healthy in ((broker, True), (1, False)):
        asked = script.replace("valkey-cli", f"valkey-cli -p {port}")
        check = subprocess.run(["sh", "-c", asked], env={"PATH": programs}, check=False)
        assert (check.returncode == 0) == healthy


def test_no_secret_stands_in_a_command_line_or_an_environment(servers: Servers) -> None:
    secret = [file.read_text().strip() for file in (servers.folder / "secrets").glob("*_password")]
    assert len(secret) == 5
    for process in servers.running.values():
        for name in ("cmdline", "environ"):
            try:
                shown = Path(f"/proc/{process.pid}/{name}").read_text()
            except PermissionError:
                continue  # closed to our own user even
            assert not any(each in shown for each in secret)


def test_both_nodes_get_work_and_a_stopped_ones_job_goes_on_at_the_other(
    servers: Servers, records: TestDatabase
) -> None:
    jobs = [servers.submit(steps=STEPS, step_s=0.08, save_steps=5) for _ in range(3)]

    def at() -> dict[str, str]:
        found = [servers.job(job) for job in jobs]
        return {j["id"]: j["attempts"][0]["node"] for j in found if j["state"] == "running"}

    wait_for(
        lambda: set(at().values()) == {"node-1", "node-2"}, within_s=30, what="work on both nodes"
    )
    moved = next(job for job, node in at().items() if node == "node-1")
    wait_for(lambda: servers.artifacts(moved), within_s=20, what="a checkpoint in the store")

    assert servers.stop("worker") < 20

    for job in jobs:
        servers.finish(job)
    first, second = servers.job(moved)["attempts"]
    assert (first["node"], first["outcome"]) == ("node-1", "stopped")
    assert (first["stop_reason"], first["charged"]) == ("shutdown", False)
    assert second["node"] == "node-2"
    steps = servers.steps(moved)
    assert set(steps) == set(range(1, STEPS + 1))
    assert len(steps) - STEPS <= 5  # it went on from a checkpoint of the shared store
    assert broken_invariants(records) == {}


def test_flower_shows_the_workers_and_takes_no_orders(servers: Servers) -> None:
    url = f"http://{servers.addresses[FLOWER]}"
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
        workers = http.get("/api/workers", params={"status": "true"}).json()
        assert "worker@node-2" in workers
        assert http.post("/api/worker/shutdown/worker@node-2").status_code == 403


def test_keys_are_made_with_the_settings_of_migrate(servers: Servers) -> None:
    """As `docker compose run --rm migrate keys create …` does."""
    made = subprocess.run(
        servers.argv(["keys", "create", "vision", "--json"]),
        env=servers.environment("migrate"),
        capture_output=True,
        text=True,
        check=True,
    )
    with servers.http as http:
        key = {"Authorization": f"Bearer {json.loads(made.stdout)['key']}"}
        assert http.get("/me", headers=key).json()["team"] == "vision"


def test_everything_ends_well_within_its_grace_and_leaves_nothing(
    servers: Servers, records: TestDatabase
) -> None:
    for name in list(servers.running):
        servers.stop(name)
    ours = {f"attempt_{row.id.hex}" for row in records.rows("SELECT id FROM attempts")}
    assert ours & set(marked_attempts()) == set()
    states = {row.name: row.state for row in records.rows("SELECT name, state FROM nodes")}
    assert states == {"node-1": "down", "node-2": "down"}
