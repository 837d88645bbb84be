"""The API while its database or broker is away, and its own beginning and end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from support.apis import ASK, Api, serve
from support.databases import PASSWORD, TestDatabase, migration_settings, run_statement
from support.yards import wait_for

from tuneyard.api.main import bind, run
from tuneyard.local import ports
from tuneyard.local.postgres import RunningPostgres, start_postgres
from tuneyard.local.valkey import RunningValkey
from tuneyard.models.engine import Database, Patience
from tuneyard.models.migration import migrate
from tuneyard.specs.errors import InputError, Unavailable
from tuneyard.specs.settings import Settings


@pytest.fixture
def own_db(tmp_path: Path) -> Iterator[TestDatabase]:
    """A database on a server of its own, which the test may stop."""
    server = start_postgres(tmp_path / "postgres", fsync=False, die_with_parent=True)
    run_statement(server.url, "CREATE DATABASE mine")
    migrate(migration_settings(server.plan.url(database="mine")))
    roles = {
        role: Database(server.plan.url(f"tuneyard_{role}", PASSWORD, "mine"), f"test-{role}")
        for role in ("api", "worker", "scheduler")
    }
    owner = Database(server.plan.url(database="mine"), "test-owner")
    yield TestDatabase(server, "mine", owner, **roles)
    for each in (owner, *roles.values()):
        each.close()
    server.stop()


@contextmanager
def frozen(server: RunningPostgres) -> Iterator[None]:
    """SIGSTOP of all of a server's processes: its kernel goes on to answer for it."""
    parent = server.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    stopped = [parent, *map(int, children)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):  # one that was told to end meanwhile
                os.kill(pid, signal.SIGCONT)


def start_again(server: RunningPostgres) -> RunningPostgres:
    return start_postgres(server.plan.folder, fsync=False, die_with_parent=True)


def test_without_postgres_all_is_503_with_a_time_and_then_all_is_well(
    own_db: TestDatabase, tmp_path: Path
) -> None:
    with serve(own_db, tmp_path / "home") as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        own_db.server.stop()
        began = time.monotonic()
        answers = [http.get("/jobs"), http.get(f"/jobs/{job}"), http.post("/jobs", json=ASK)]
        assert time.monotonic() - began < 3
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "db_unavailable"
        assert httpx.get(f"{api.url}/healthz", trust_env=False).status_code == 200
        ready = httpx.get(f"{api.url}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()["database"]) == (503, "unavailable")
        again = start_again(own_db.server)
        try:
            assert http.get(f"/jobs/{job}").json()["state"] == "queued"
            assert http.post("/jobs", json=ASK).status_code == 201
            assert httpx.get(f"{api.url}/readyz", trust_env=False).status_code == 200
        finally:
            again.stop()


def read_ids(http: httpx.Client, job: str, ids: list[int]) -> None:
    """Add the id of each event of a job's stream, till its end."""
    headers = {"Accept": "text/event-stream"}
    with http.stream("GET", f"/jobs/{job}/events", headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("id: "):
                ids.append(int(line[4:]))


def test_a_stream_waits_for_a_database_that_is_away(own_db: TestDatabase, tmp_path: Path) -> None:
    ids: list[int] = []
    with serve(own_db, tmp_path / "home") as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        reader = threading.Thread(target=read_ids, args=[http, job, ids], daemon=True)
        reader.start()
        wait_for(lambda: ids, within_s=10, what="the first event")
        own_db.server.stop()
        assert http.get("/jobs").status_code == 503
        again = start_again(own_db.server)
        try:
            assert http.post(f"/jobs/{job}/cancel").status_code == 200
            reader.join(20)
        finally:
            again.stop()
    assert ids == [1, 2]


def test_a_frozen_postgres_is_503_within_5_s_and_all_heals_by_itself(
    own_db: TestDatabase, tmp_path: Path
) -> None:
    ids: list[int] = []

    def timed(path: str) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        answer = http.get(f"{api.url}{path}", timeout=30)
        return answer, time.monotonic() - began

    with serve(own_db, tmp_path / "home") as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        reader = threading.Thread(target=read_ids, args=[http, job, ids], daemon=True)
        reader.start()
        wait_for(lambda: ids, within_s=10, what="the first event")
        asked = ["/readyz", *["/api/v1/jobs", f"/api/v1/jobs/{job}"] * 25]  # more than threads
        with frozen(own_db.server), ThreadPoolExecutor(len(asked)) as askers:
            answers = list(askers.map(timed, asked))
            assert [a.status_code for a, _ in answers] == [503] * len(asked)
            assert {a.headers["retry-after"] for a, _ in answers} == {"1"}
            assert max(seconds for _, seconds in answers) < 7, "5 s, and what a busy machine adds"
            # Once it is known to be silent, one caller waits and no other.
            again = list(askers.map(timed, asked[:10]))
            assert sorted(seconds for _, seconds in again)[5] < 1
        wait_for(lambda: timed("/readyz")[0].status_code == 200, within_s=10, what="being ready")
        assert http.post(f"/jobs/{job}/cancel").status_code == 200
        reader.join(20)
    assert ids == [1, 2]


@pytest.mark.parametrize("reserved", [False, True])
def test_no_statement_waits_for_ever_for_a_silent_postgres(
    own_db: TestDatabase, *, reserved: bool
) -> None:
    url = own_db.url("worker")
    db = Database(url, "test", patience=Patience(connect_s=2, ping_s=0.3, answer_s=0.5))
    begin = db.begin_reserved if reserved else db.begin
    began = time.monotonic()
    with pytest.raises(Unavailable), begin() as tx, frozen(own_db.server):
        tx.execute(text("SELECT 1"))
    with frozen(own_db.server):
        with pytest.raises(Unavailable), begin():
            pass
        assert time.monotonic() - began < 5
    with begin() as tx:
        assert tx.execute(text("SELECT 1")).scalar() == 1
    db.close()


def test_it_begins_while_the_database_is_away(own_db: TestDatabase, tmp_path: Path) -> None:
    with serve(own_db, tmp_path / "home") as first:
        first.client().close()
    own_db.server.stop()
    with serve(own_db, tmp_path / "home") as api:
        assert httpx.get(f"{api.url}/healthz", trust_env=False).status_code == 200
        headers = {"Authorization": "Bearer ty-default-admin"}
        url = f"{api.url}/api/v1/jobs"
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 503
        again = start_again(own_db.server)
        try:
            assert httpx.get(url, headers=headers, trust_env=False).status_code == 200
        finally:
            again.stop()


def test_without_a_broker_it_is_degraded_and_says_so_once(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.api.broker.KNOWN_S", 0.0)
    for _ in range(3):
        ready = httpx.get(f"{api.url}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()) == (
            200,
            {"status": "degraded", "database": "ok", "broker": "unavailable"},
        )
    assert len([r for r in caplog.records if getattr(r, "event", "") == "broker_changed"]) == 1
    api.a_base()
    with api.client() as http:
        assert http.post("/jobs", json=ASK).status_code == 201


def test_with_both_it_is_ready(db: TestDatabase, tmp_path: Path, valkey: RunningValkey) -> None:
    with serve(db, tmp_path, broker_url=SecretStr(valkey.url)) as api:
        ready = httpx.get(f"{api.url}/readyz", trust_env=False)
        assert ready.json() == {"status": "ready", "database": "ok", "broker": "ok"}


def test_more_requests_than_connections_are_told_to_come_again(
    db: TestDatabase, tmp_path: Path
) -> None:
    # The first request keeps its connection for as long as the test looks.
    run_statement(
        db.server.url, f"ALTER ROLE tuneyard_api IN DATABASE {db.name} SET lock_timeout = '30s'"
    )
    with serve(db, tmp_path, api_threads=1) as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        with db.owner.begin() as tx:
            tx.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")
            waiting: list[Any] = []
            first = threading.Thread(
                target=lambda: waiting.append(http.post(f"/jobs/{job}/cancel")), daemon=True
            )
            first.start()
            wait_for(lambda: waits_for_a_lock(db), within_s=10, what="the lock's being waited for")
            busy = http.get("/jobs")
            assert (busy.status_code, busy.json()["error"]["code"]) == (503, "db_busy")
            assert busy.headers["retry-after"] == "1"
        first.join(10)
        assert waiting[0].status_code == 200
        assert http.get("/jobs").status_code == 200


def waits_for_a_lock(db: TestDatabase) -> bool:
    rows = db.rows("SELECT 1 FROM pg_locks WHERE NOT granted")
    return bool(rows)


def test_a_lock_that_is_held_too_long_is_503_and_nothing_is_kept(
    db: TestDatabase, tmp_path: Path
) -> None:
    migrate(migration_settings(db.server.plan.url(database=db.name)))
    db.run("ALTER ROLE tuneyard_api IN DATABASE " + db.name + " SET lock_timeout = '200ms'")
    with serve(db, tmp_path) as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        with db.owner.begin() as tx:
            tx.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")
            assert http.post(f"/jobs/{job}/cancel").status_code == 503
        assert http.get(f"/jobs/{job}").json()["state"] == "queued"


# The process itself -----------------------------------------------------------------------------


@pytest.fixture
def process(db: TestDatabase, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """`tuneyard api` in a process of its own, and its URL."""
    port = ports.any_free()
    env = os.environ | {
        "TUNEYARD_HOME": str(tmp_path),
        "TUNEYARD_DATABASE_URL": db.url("api"),
        "TUNEYARD_BROKER_URL": "redis://127.0.0.1:1/0",
        "TUNEYARD_API_PORT": str(port),
    }
    command = [sys.executable, "-P", "-m", "tuneyard.cli.main", "api"]
    with (tmp_path / "api.log").open("wb") as log:
        started = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    yield started, f"http://127.0.0.1:{port}"
    started.kill()
    started.wait()


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_ends_streams_and_the_process_in_good_order(
    db: TestDatabase, tmp_path: Path, process: tuple["subprocess.Popen[bytes]", str]
) -> None:
    started, url = process
    wait_for(lambda: is_healthy(url), within_s=20, what="the API's start")
    with serve(db, tmp_path / "other") as api, api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        headers = {"Accept": "text/event-stream", "Authorization": http.headers["authorization"]}
    events = f"{url}/api/v1/jobs/{job}/events"
    with httpx.stream("GET", events, headers=headers, timeout=20, trust_env=False) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "id: 1"
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        list(lines)  # the stream ends as a whole answer, no connection is cut
    assert started.wait(10) == 0
    assert time.monotonic() - began < 3
    assert "Traceback" not in (tmp_path / "api.log").read_text()


def test_a_taken_port_is_a_sentence(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}") as refused:
            run(Settings(home=tmp_path, api_port=port))
    assert refused.value.code == "port_taken"


def test_a_store_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match="cannot be written") as refused:
        run(Settings(home=tmp_path, api_port=0))
    assert refused.value.code == "not_writable"
