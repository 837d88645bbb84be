"""The supervisor: starts children in their order, starts again what ends, stops all in reverse.

It may be killed at any moment: the children go on, each is on record, and the next supervisor
takes over those that run what it would have started.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from tuneyard.local import processes
from tuneyard.local.children import STOOD_S, Child, backoff_s
from tuneyard.local.home import Home, Record
from tuneyard.local.processes import ProcessId
from tuneyard.specs.errors import Unavailable

log = logging.getLogger(__name__)

MARK = "TUNEYARD_CHILD"
"""Environment variable of every child; finds one whose record was not written any more."""

STATE = "supervisor.json"
LOOK_EVERY_S = 0.1
READY_EVERY_S = 0.03
QUICK_ENDS = 3
"""So many ends during the start are a failure that waiting does not mend."""

LOG_BYTES = 10 * 1024**2
STOPS = (signal.SIGTERM, signal.SIGINT)
AWAITED = (*STOPS, signal.SIGCHLD, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked to stop while children were still being started."""


@dataclass
class Watched:
    """A child, and what became of it so far."""

    child: Child
    process: ProcessId | None = None
    started: float = 0.0  # on the monotonic clock
    failures: int = 0  # quick ends in a row
    starts: int = 0
    start_at: float = 0.0
    is_ready: bool = False
    ended_well: bool = False

    def is_due(self, now: float) -> bool:
        """Whether it ended and shall be started again by now."""
        ended = self.process is None and self.starts > 0 and not self.ended_well
        return ended and now >= self.start_at


class Supervisor:
    """Keeps the children of one home running, from one thread."""

    def __init__(self, home: Home, children: Sequence[Child]) -> None:
        self._home = home
        self._watched = [Watched(child) for child in children]
        self._impatient = False
        self._said: dict[str, object] = {}

    def run(self, *, ready: Mapping[str, object], on_ready: Callable[[], None]) -> None:
        """Start, tell, watch until SIGTERM or SIGINT, stop.

        ready: what the state file says once all are ready; on_ready: called when it does.
        Raises: Unavailable with the end of a log when a child does not start.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
        try:
            self._start_all()
            self._say("ready", **ready)
            on_ready()
            while True:
                self._wait()
                self._look()
        except Stopped:
            pass
        finally:
            self._stop_all()

    def _start_all(self) -> None:
        for _, stage in groupby(self._watched, key=lambda each: each.child.stage):
            starting = list(stage)
            for watched in starting:
                self._adopt_or_start(watched)
            self._until_ready(starting)

    def _until_ready(self, starting: list[Watched]) -> None:
        deadline = time.monotonic() + max(each.child.ready_within_s for each in starting)
        while waiting := [each for each in starting if not self._ask_ready(each)]:
            self._say("starting", waiting_for=[each.child.name for each in waiting])
            for each in waiting:
                if each.failures >= QUICK_ENDS or time.monotonic() > deadline:
                    raise self._no_start(each)
            self._wait(READY_EVERY_S)
            self._look()

    def _ask_ready(self, watched: Watched) -> bool:
        """Ask until it says yes once; what becomes of it later is its clients' affair."""
        if not watched.is_ready and watched.process is not None and not watched.child.once:
            watched.is_ready = watched.child.is_ready(watched.process)
        return watched.is_ready or watched.ended_well

    def _no_start(self, watched: Watched) -> Unavailable:
        name = watched.child.name
        file = self._home.log(name)
        ended = watched.failures >= QUICK_ENDS
        how = "ended at once, three times" if ended else "was not ready in time"
        return Unavailable(
            f"{name} {how}. The end of its log:\n{processes.last_lines(file)}",
            code="start_failed",
            hint=f"its whole log is {file}",
        )

    def _look(self) -> None:
        """Note who ended, and start again whose time has come."""
        for watched in self._watched:
            if watched.process is not None and not watched.process.alive:
                self._note_end(watched, processes.reap(watched.process))
            if watched.is_due(time.monotonic()):
                self._start(watched)

    def _note_end(self, watched: Watched, exit_code: int | None) -> None:
        now, name = time.monotonic(), watched.child.name
        watched.process, watched.is_ready = None, False
        watched.ended_well = watched.child.once and exit_code == 0
        if watched.ended_well:
            self._home.forget_record(name)
            return
        if now - watched.started >= STOOD_S:
            watched.failures = 0
        watched.start_at = now + backoff_s(watched.failures)
        watched.failures += 1
        fields = {"event": "child_ended", "child": name, "exit_code": exit_code}
        log.warning("child ended", extra=fields)

    def _adopt_or_start(self, watched: Watched) -> None:
        child = watched.child
        running = find_running(self._home, child.name)
        record = self._home.record(child.name)
        if running is None:
            self._start(watched)
        elif record and record.process == running and record.fingerprint == child.fingerprint:
            watched.process, watched.starts = running, record.restarts + 1
            watched.started = time.monotonic()
            log.info("child taken over", extra={"event": "child_taken_over", "child": child.name})
        else:
            processes.stop(running, by=child.stop_signal, within_s=child.stop_within_s)
            self._start(watched)

    def _start(self, watched: Watched) -> None:
        child = watched.child
        file = self._home.log(child.name)
        env = {**child.env, MARK: mark_of(self._home, child.name)}
        watched.started = time.monotonic()
        watched.starts += 1
        try:
            rotate(file)
            watched.process = processes.start(child.argv, env=env, log=file)
        except OSError as error:
            fields = {"event": "child_not_started", "child": child.name}
            log.warning("child not started: %s", error, extra=fields)
            self._note_end(watched, None)
            return
        record = self._record(watched, watched.process)
        self._write(lambda: self._home.keep_record(child.name, record))
        log.info("child started", extra={"event": "child_started", "child": child.name})

    def _record(self, watched: Watched, process: ProcessId) -> Record:
        child = watched.child
        return Record(
            pid=process.pid,
            start_time=process.start_time,
            boot_id=processes.boot_id(),
            started_at=time.time(),
            restarts=watched.starts - 1,
            fingerprint=child.fingerprint,
            stop_signal=child.stop_signal,
            stop_within_s=child.stop_within_s,
        )

    def _stop_all(self) -> None:
        self._say("stopping")
        for watched in reversed(self._watched):
            if watched.process is not None:
                self._stop(watched.child, watched.process)
            self._home.forget_record(watched.child.name)
        self._home.run(STATE).unlink(missing_ok=True)

    def _stop(self, child: Child, process: ProcessId) -> None:
        """Signal and wait; a second SIGTERM or SIGINT to the supervisor ends its patience."""
        processes.signal_process(process, child.stop_signal)
        deadline = time.monotonic() + child.stop_within_s
        while process.alive and not self._impatient and time.monotonic() < deadline:
            if signal.sigtimedwait(STOPS, processes.POLL_S):
                self._impatient = True
        clean = processes.stop(process, by=child.stop_signal, within_s=0.0)
        log.info("child stopped", extra={"event": "child_stopped", "child": child.name})
        if not clean:
            log.warning("child killed", extra={"event": "child_killed", "child": child.name})

    def _wait(self, timeout_s: float = LOOK_EVERY_S) -> None:
        """Sleep until a child ends. Raises: Stopped."""
        heard = signal.sigtimedwait(AWAITED, timeout_s)
        if heard and heard.si_signo in STOPS:
            raise Stopped

    def _say(self, phase: str, **more: object) -> None:
        """Tell ``up`` and ``status`` how far it is."""
        said: dict[str, object] = {"pid": os.getpid(), "phase": phase, **more}
        if said != self._said:
            self._said = said
            self._write(lambda: self._home.write_json(self._home.run(STATE), said))

    def _write(self, write: Callable[[], None]) -> None:
        """Write for others to read; a full disk must not end what runs."""
        try:
            write()
        except OSError as error:
            log.warning("not written: %s", error, extra={"event": "not_written"})


def find_running(home: Home, name: str) -> ProcessId | None:
    """The living process of a child: by its record, or by its mark when that came too late."""
    record = home.record(name)
    if record and record.process.alive:
        return record.process
    return processes.marked(MARK).get(mark_of(home, name))


def running_children(home: Home) -> list[str]:
    """Names of what runs, in the order of its start; what was not recorded any more comes last."""
    recorded = [name for name in home.children() if find_running(home, name)]
    ours = mark_of(home, "")
    bearing = [mark.removesuffix(ours) for mark in processes.marked(MARK) if mark.endswith(ours)]
    return recorded + [name for name in bearing if name not in recorded]


def mark_of(home: Home, name: str) -> str:
    """The value of MARK for one child."""
    return f"{name}@{home.root}"


def rotate(file: os.PathLike[str]) -> None:
    """Put a long log aside; one older is kept."""
    try:
        if os.stat(file).st_size > LOG_BYTES:
            os.replace(file, f"{os.fspath(file)}.1")
    except FileNotFoundError:
        pass
