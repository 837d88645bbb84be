"""Processes as this package sees them: started into a session of their own, known by identity.

A pid alone names nothing: it is given out again. A pid and the kernel's start time name one
process for as long as the machine is up.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.02


class ProcessId(NamedTuple):
    """One process of this boot (see ``boot_id``)."""

    pid: int
    start_time: int  # clock ticks since boot: /proc/PID/stat, field 22

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return process_id(self.pid) == self


def process_id(pid: int) -> ProcessId | None:
    """Identify the process that bears a pid now, or None where there is none (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # the name may hold spaces and brackets
    return None if state in "ZX" else ProcessId(pid, int(fields[18]))


def boot_id() -> str:
    """This boot of the machine: start times mean something within it only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path, stdout: int | None = None
) -> ProcessId:
    """Start a command in a session of its own; its outputs are appended to ``log``.

    stdout: a descriptor that takes the standard output instead.
    posix_spawn, not Popen: the child outlives its starter by design, and it must not inherit the
    signals that a supervisor blocks.
    """
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(log), mode, 0o600),
            (os.POSIX_SPAWN_DUP2, 2 if stdout is None else stdout, 1),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
    )
    return process_id(pid) or ProcessId(pid, -1)


def signal_process(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to exactly this process; nothing happens where it is gone."""
    if process.alive:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def stop(process: ProcessId, *, by: signal.Signals = signal.SIGTERM, within_s: float) -> bool:
    """End a process: ``by`` first, SIGKILL after ``within_s``. False: it had to be killed."""
    signal_process(process, by)
    if wait_gone(process, within_s=within_s):
        return True
    signal_process(process, signal.SIGKILL)
    wait_gone(process, within_s=5.0)
    return False


def wait_gone(process: ProcessId, *, within_s: float) -> bool:
    """Wait for a process's end, reaping it if it is a child of ours."""
    return wait_until(lambda: reap(process) is not None or not process.alive, within_s=within_s)


def wait_until(condition: Callable[[], bool], *, within_s: float) -> bool:
    """Ask until it is true, or the time is over."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def reap(process: ProcessId) -> int | None:
    """Collect a child of ours that has ended: its exit code, or minus the signal."""
    try:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if pid else None


def plain_environment(names: Iterable[str] = ("PATH", "LANG", "LC_ALL", "TZ")) -> dict[str, str]:
    """The few variables that a server needs from ours."""
    return {name: os.environ[name] for name in names if name in os.environ}


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, for a message to a person."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-count:])
    except OSError:
        return ""


def marked(variable: str) -> dict[str, ProcessId]:
    """Value of an environment variable -> the process that bears it and whose parent does not."""
    values = {pid: value for pid in _pids() if (value := _variable(pid, variable))}
    found: dict[str, ProcessId] = {}
    for pid, value in values.items():
        if values.get(_parent(pid)) != value and (process := process_id(pid)):
            found.setdefault(value, process)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _variable(pid: int, name: str) -> str:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    entries = (os.fsdecode(entry).partition("=") for entry in environ.split(b"\0"))
    return next((value for key, _, value in entries if key == name), "")


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat[stat.rindex(")") + 2 :].split()[1])
