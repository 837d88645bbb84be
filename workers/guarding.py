"""The worker's side of a guard: start one, find it again after a restart, talk to it.

What a guard does, and its protocol, stands in guard.py. Nothing here waits for long: a request
has a second, and a guard that is gone is told apart from one that is silent.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tuneyard.specs.errors import TuneyardError, Unavailable
from tuneyard.specs.exits import RunnerEnd
from tuneyard.specs.runner import ATTEMPT_MARK, EXIT_FILE, GUARD_FILE, GUARD_SOCKET

GUARD_PROGRAM = Path(__file__).with_name("guard.py")
EMPTY_FOLDER = "cwd"
START_WITHIN_S = 30.0
ANSWER_WITHIN_S = 1.0
KILL_WITHIN_S = 10.0
KILL_EVERY_S = 0.02


class GuardGone(TuneyardError):
    """The attempt's guard has ended."""

    code = "guard_gone"


class GuardSilent(Unavailable):
    """The attempt's guard lives but did not answer in time."""

    code = "guard_silent"


class NodeIdentity(NamedTuple):
    """One life of a node: pids mean something within it only."""

    boot_id: str
    pid_ns: str


@dataclass(frozen=True)
class GuardLink:
    """A guard of this node's present life, named by pid and start time."""

    workdir: Path
    pid: int
    start_time: int

    def extend(self, deadline: float) -> None:
        """Move the deadline to this boottime; an earlier one than it holds changes nothing."""
        self._ask({"deadline": deadline})

    def stop(self, grace_s: float) -> None:
        """SIGTERM to the runner now, SIGKILL to all of the attempt after the grace."""
        self._ask({"stop": {"grace_s": grace_s}})

    def runner_pid(self) -> int | None:
        """The runner's pid, from guard.json; it stays known after the runner's end."""
        pid = _read_json(self.workdir / GUARD_FILE).get("runner_pid")
        return pid if isinstance(pid, int) else None

    def alive(self) -> bool:
        """Whether the guard itself still runs; a zombie does not."""
        return _start_time(self.pid) == self.start_time

    def exit(self) -> RunnerEnd | None:
        """How the runner ended, once nothing of the attempt is left.

        To learn that a guard was lost ask ``alive()`` first: exit.json is written before its end.
        """
        return read_exit(self.workdir)

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        """Send one line, read one line. Raises: GuardGone, GuardSilent."""
        try:
            answer = _exchange(self.workdir, json.dumps(request).encode() + b"\n")
        except (TimeoutError, BlockingIOError):
            raise GuardSilent() from None
        except OSError as error:
            raise GuardGone(f"The attempt's guard is gone: {error}") from None
        if "error" in answer:
            raise GuardGone(f"The attempt's guard refused: {answer['error']}")
        return answer


def start_guard(
    workdir: Path,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    deadline: float,
    grace_s: float,
    cores: Collection[int] | None = None,
) -> GuardLink:
    """Start a runner behind a guard of its own; returns when the runner's process exists.

    env: the runner's whole environment, with ATTEMPT_MARK. deadline: on CLOCK_BOOTTIME.
    Raises: GuardGone with what the guard said, where it could not even start.
    """
    if adopt_guard(workdir) is not None:
        raise RuntimeError(f"{workdir} has a living guard already")
    for stale in (GUARD_FILE, EXIT_FILE):
        (workdir / stale).unlink(missing_ok=True)
    (workdir / EMPTY_FOLDER).mkdir(exist_ok=True)
    options = {"deadline": deadline, "grace": grace_s, "cwd": workdir / EMPTY_FOLDER}
    if cores:
        options["cores"] = ",".join(map(str, sorted(cores)))
    named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-I", "-S", str(GUARD_PROGRAM), str(workdir), *named, "--", *argv]
    try:
        starter = subprocess.run(
            command, env=env, capture_output=True, timeout=START_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GuardSilent("The attempt's guard did not start in time.") from None
    link = adopt_guard(workdir) or _ended_guard(workdir)
    if starter.returncode != 0 or link is None:
        reason = starter.stderr.decode("utf-8", "replace").strip()
        raise GuardGone(f"The attempt's guard did not start: {reason[-2000:]}")
    return link


def adopt_guard(workdir: Path) -> GuardLink | None:
    """Find the living guard of a folder; None where it ended, or was of another life."""
    link = _ended_guard(workdir)
    return link if link and link.alive() else None


def read_exit_report(workdir: Path) -> dict[str, Any]:
    """All that the guard of a folder wrote at its end; empty before that, or where it was lost.

    code, signal, oom_killed, maxrss (bytes), descendants_killed, unkillable ([pid, start time]
    of each process that outlived SIGKILL), ended_at (Unix seconds).
    """
    return _read_json(workdir / EXIT_FILE)


def read_exit(workdir: Path) -> RunnerEnd | None:
    """How the runner of a folder ended; None where no guard said so."""
    report = read_exit_report(workdir)
    if not report:
        return None
    return RunnerEnd(report["code"], report["signal"], report["oom_killed"])


def still_there(workdir: Path, attempt_id: str) -> set[int]:
    """Kill what bears an attempt's mark; the pids that outlived it, and the guard's own killing."""
    unkillable = read_exit_report(workdir).get("unkillable", [])
    return kill_marked({attempt_id}) | {pid for pid, at in unkillable if _start_time(pid) == at}


def marked_attempts() -> dict[str, list[int]]:
    """Attempt -> pids of the processes that bear its mark, guards included."""
    found: dict[str, list[int]] = {}
    for pid, attempt in _marks():
        found.setdefault(attempt, []).append(pid)
    return found


def kill_marked(attempt_ids: Collection[str]) -> set[int]:
    """SIGKILL every process that bears the mark of one of these attempts, until none is left.

    Returns: pids that were still there after 10 s.
    """
    deadline = time.monotonic() + KILL_WITHIN_S
    while left := {pid for pid, attempt in _marks() if attempt in attempt_ids}:
        if time.monotonic() > deadline:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(KILL_EVERY_S)
    return left


def node_identity() -> NodeIdentity:
    """This life of this node."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return NodeIdentity(boot_id, os.readlink("/proc/self/ns/pid"))


def boottime() -> float:
    """Seconds since boot, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _ended_guard(workdir: Path) -> GuardLink | None:
    """The guard that guard.json names, dead or alive, if it was of this life."""
    known = _read_json(workdir / GUARD_FILE)
    if not known or NodeIdentity(known["boot_id"], known["pid_ns"]) != node_identity():
        return None
    return GuardLink(workdir, known["pid"], known["start_time"])


def _exchange(workdir: Path, line: bytes) -> dict[str, Any]:
    """One request over the socket, through the folder's descriptor: its path may be too long."""
    folder = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_WITHIN_S)
            connection.connect(f"/proc/self/fd/{folder}/{GUARD_SOCKET}")
            connection.sendall(line)
            with connection.makefile("rb") as answers:
                answer = answers.readline()
    finally:
        os.close(folder)
    if not answer.endswith(b"\n"):
        raise ConnectionResetError("it closed the connection")
    decoded: dict[str, Any] = json.loads(answer)
    return decoded


def _marks() -> Iterator[tuple[int, str]]:
    """(pid, attempt) of each marked process that we may look into, except this one."""
    mark = ATTEMPT_MARK.encode() + b"="
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        for variable in environ.split(b"\0"):
            if variable.startswith(mark):
                yield int(name), variable.removeprefix(mark).decode("ascii", "replace")


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state in b"ZX" else int(fields[18])


def _read_json(path: Path) -> dict[str, Any]:
    """A file of the guard; they are renamed into place, so one that exists is whole."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
