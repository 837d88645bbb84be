"""Reporting a run to trackers, none of which can fail or delay it.

Each has a process of its own (runners/tracker.py) that reads events.jsonl as the worker does. One
that ends badly, or hangs when the run is over, is said once, in a warning. What the others wrote
becomes WORKDIR/reports, which the worker publishes beside the result.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.events import EventLog
from tuneyard.runners.failures import Stopped
from tuneyard.runners.run_files import effective_arguments
from tuneyard.runners.tracker import FAILED_FILE, NOTES_FILE, Tracking, secrets_of
from tuneyard.runners.training import Trainer
from tuneyard.specs.runner import EVENTS_FILE, REPORTS, TRACKER_FILE
from tuneyard.specs.tracking import trackers_of
from tuneyard.store.folder import is_safe_name, publish_folder

FINISH_S = 10.0
"""So long all trackers together may take to hand over the rest when the run is over."""


@contextmanager
def tracked(asked: Asked, attempt: Attempt, trainer: Trainer) -> Iterator[None]:
    """Report what is measured within; at the end wait a moment for the trackers, and publish."""
    reporters = _start_all(asked, attempt, trainer)
    try:
        yield
    except Stopped:
        for reporter in reporters:
            reporter.forget()  # the next attempt tells it all again
        raise
    except BaseException:
        _finish_all(reporters)
        raise
    _finish_all(reporters)
    _publish(reporters, attempt)


class Reporter:
    """One tracker's process."""

    def __init__(self, tracking: Tracking, folder: Path, events: EventLog) -> None:
        self.name, self.files = tracking.tracker, folder / "files"
        self._folder, self._events = folder, events
        self._hangs = self._forgotten = False
        self.files.mkdir(parents=True)
        told = folder / "tracking.json"
        told.write_text(tracking.model_dump_json(), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tuneyard.runners.tracker", str(told)],
                cwd=self.files,
                env=os.environ | {"HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watch = threading.Thread(target=self._await_end, daemon=True)
        self._watch.start()

    def end(self) -> None:
        """Say that the run is over."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def finish(self, *, within_s: float) -> None:
        """Wait for its end, and make one."""
        self._watch.join(within_s)
        self._hangs = self._watch.is_alive()
        self._kill()

    def forget(self) -> None:
        """End it without a word."""
        self._forgotten = True
        self.end()
        self._kill()

    def _kill(self) -> None:
        """What the package may have started goes, too."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left of it
        self._watch.join()

    def _await_end(self) -> None:
        code = self._process.wait()
        if self._forgotten:
            return
        if code:
            message = f"{self.name}: {self._reason(code)} The run goes on without it."
            self._events.warn("tracker_failed", message)
        for note in self._read(NOTES_FILE).splitlines():
            self._events.warn("tracker", note)

    def _reason(self, code: int) -> str:
        if self._hangs:
            return f"it had not finished {FINISH_S:g} s after the run."
        said = self._read(FAILED_FILE).strip()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{said.rstrip('.')}." if said else f"its process ended with {how}."

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""


def _start_all(asked: Asked, attempt: Attempt, trainer: Trainer) -> list[Reporter]:
    arguments = asked.arguments
    names, named = trackers_of(arguments.report_to, arguments.use_swanlab)
    folder = attempt.workdir / ".trackers"
    shutil.rmtree(folder, ignore_errors=True)
    reporters = []
    for name in names:
        if find_spec(name) is None:
            if named:
                message = f"{name} is not installed for this node's runners. The run goes on"
                attempt.events.warn("tracker_failed", f"{message} without it.")
            continue
        try:
            tracking = _told(name, asked, attempt, trainer)
            reporters.append(Reporter(tracking, folder / name, attempt.events))
        except OSError as error:
            message = f"{name} cannot be started: {error}. The run goes on without it."
            attempt.events.warn("tracker_failed", message)
    return reporters


def _told(name: str, asked: Asked, attempt: Attempt, trainer: Trainer) -> Tracking:
    arguments, events = asked.arguments, attempt.workdir / EVENTS_FILE
    swanlab = name == "swanlab"
    own = arguments.swanlab_run_name if swanlab else None
    return Tracking(
        tracker=name,
        name=own or arguments.run_name or attempt.spec.job,
        project=arguments.swanlab_project if swanlab else arguments.project,
        workspace=arguments.swanlab_workspace,
        local=arguments.swanlab_mode == "local",
        job=attempt.spec.job,
        arguments=effective_arguments(asked, attempt),
        total=trainer.plan.steps,
        every=trainer.plan.log_every,
        events=str(events),
        offset=events.stat().st_size,
        history=trainer.at.log,
        window=trainer.at.window,
        variables=os.environ.get(TRACKER_FILE),
    )


def _finish_all(reporters: Sequence[Reporter]) -> None:
    """Let all finish at once, for so long."""
    give_up_at = time.monotonic() + FINISH_S
    for reporter in reporters:
        reporter.end()
    for reporter in reporters:
        reporter.finish(within_s=max(0.0, give_up_at - time.monotonic()))


def _publish(reporters: Sequence[Reporter], attempt: Attempt) -> None:
    """Make WORKDIR/reports of what trackers wrote, but for what no artifact may hold."""
    aside = attempt.workdir / ".aside-reports"
    shutil.rmtree(aside, ignore_errors=True)
    secrets = [each.encode() for each in secrets_of(os.environ.get(TRACKER_FILE))]
    try:
        for reporter in reporters:
            _copy(reporter.files, aside, secrets)
        if aside.exists():
            publish_folder(aside, attempt.workdir / REPORTS, {"kind": "reports"})
    except OSError as error:
        attempt.events.warn("tracker_failed", f"The reports cannot be kept: {error}.")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(files: Path, aside: Path, secrets: Sequence[bytes]) -> None:
    """Plain files with names that every machine takes and without a secret; empty ones are not
    worth it."""
    for path in sorted(files.rglob("*")):
        name = path.relative_to(files).as_posix()
        if not stat.S_ISREG(path.lstat().st_mode) or not is_safe_name(name):
            continue
        content = path.read_bytes()
        if content and not any(secret in content for secret in secrets):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)
