"""Keeping one attempt: stage it, start its runner behind a guard, ship what it says, end it.

A keeper is a thread of the supervisor's. Whatever it writes is fenced by the attempt's token; once
a write is refused it kills the runner and leaves no trace but a line that says so.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection

from tuneyard.models import attempts
from tuneyard.models.artifacts import forget_work, recorded_base_model
from tuneyard.models.attempts import AttemptRef, End
from tuneyard.models.engine import Database
from tuneyard.specs.errors import Conflict, StaleToken, TuneyardError, Unavailable
from tuneyard.specs.exits import (
    Cause,
    Outcome,
    RunnerEnd,
    StopReason,
    Verdict,
    after_stall,
    judge,
)
from tuneyard.specs.ids import show_id
from tuneyard.specs.runner import EVENTS_FILE, GUARD_FILE, LOG_FILE, OUTPUT
from tuneyard.specs.settings import Settings
from tuneyard.store.remote import Store, StoreUnreachable
from tuneyard.workers.cache import adopt
from tuneyard.workers.guarding import (
    GuardGone,
    GuardLink,
    GuardSilent,
    adopt_guard,
    read_exit,
    read_exit_report,
    start_guard,
    still_there,
)
from tuneyard.workers.hub_access import places
from tuneyard.workers.publishing import OutputNotWhole, publish
from tuneyard.workers.reading import read_last_words
from tuneyard.workers.shipping import ship_new
from tuneyard.workers.staging import (
    InputGone,
    cause_of,
    read_errand,
    remove_work,
    runner_command,
    stage,
)

log = logging.getLogger(__name__)

SHIP_EVERY_S = 1.0
LOOK_EVERY_S = 0.1
STORE_PAUSE_S, MAX_STORE_PAUSE_S = 1.5, 15.0

HELD_TOO_LONG_S = 30.0
"""What stays held for so long is not waited for; nobody else gets it before it is free."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Node:
    """What all keepers of a worker share."""

    id: UUID
    db: Database
    store: Store
    settings: Settings

    @property
    def cache(self) -> Path:
        """The folder of what jobs of this node share."""
        return self.settings.home / "cache"

    def workdir(self, ref: AttemptRef) -> Path:
        """The attempt's own folder on this node."""
        return self.settings.home / "work" / show_id("attempt", ref.id)


class Keeper:
    """One attempt on this node, from its claim to its end."""

    def __init__(self, node: Node, assignment: attempts.Assignment, *, renewed_at: float) -> None:
        self.ref = assignment.ref
        self.kind = assignment.kind
        self.name = assignment.name
        self.done = threading.Event()
        self.verdict: Verdict | None = None
        self.wanted_bytes = 0  # of the disk, as far as the runner said
        self._node = node
        self._workdir = node.workdir(self.ref)
        self._adopting = assignment.claimed_by is not None
        self._stalled = False
        self._control = Control(node.settings, renewed_at, name=self.ref.id.hex[-6:])
        self._thread = threading.Thread(target=self._run, name=f"keep-{self.ref.id.hex[-6:]}")
        self._thread.daemon = True

    def start(self) -> None:
        """Begin to keep."""
        self._thread.start()

    def renewed(self, requested_at: float) -> None:
        """The lease was renewed by a request that was sent at this boottime."""
        self._control.renewed(requested_at)

    def fence(self) -> None:
        """The lease is not ours any more: nothing of this attempt may go on."""
        self._control.fence()

    def stop(self, reason: StopReason) -> None:
        """Stop the runner at a checkpoint; SIGKILL follows after the grace."""
        self._control.stop(reason)

    def _run(self) -> None:
        try:
            end = self._run_to_end()
            if end is not None:
                self._conclude(end)
        except StaleToken:
            self._abandon()
        except Exception as error:
            # A bug of ours must not leave an attempt that lives for ever in silence.
            log.exception("keeper failed", extra={"event": "keeper_failed", **self._fields()})
            self._give_up(f"the worker met an internal error: {error!r}")
        finally:
            self._control.close()
            self.done.set()

    # From the claim to the runner's end -------------------------------------------------------

    def _run_to_end(self) -> RunnerEnd | None:
        """None when the attempt ended before a runner was needed."""
        link = adopt_guard(self._workdir) if self._adopting else None
        if link is not None:
            log.info("attempt re-adopted", extra={"event": "attempt_adopted", **self._fields()})
        elif self._adopting and (self._workdir / GUARD_FILE).exists():
            return self._end_of_a_lost_guard()
        else:
            link = self._launch()
        if link is None:
            return None
        self._control.attach(link)
        return self._watch(link)

    def _launch(self) -> GuardLink | None:
        if left := self._left():
            raise RuntimeError(f"processes {left} of an earlier start cannot be killed")
        if self._control.stop_reason is not None:
            self._finish(End(Verdict(Outcome.STOPPED), "stopped before its runner started"))
            return None
        settings = self._node.settings
        errand = self._until_written(lambda tx: read_errand(tx, self.ref))
        try:
            here = places(settings, os.environ) if errand.kind == "download" else {}
            rejected = self._until_stored(
                lambda: stage(
                    errand, self._workdir, self._node.store, cache=self._node.cache, places=here
                )
            )
        except StoreUnreachable as away:
            verdict = Verdict(Outcome.LOST, Cause.STORE_UNREACHABLE)
            self._finish(End(verdict, f"the inputs could not be fetched: {away}"))
            return None
        except InputGone as gone:
            verdict = Verdict(Outcome.FAILED, Cause.INPUT_GONE, charged=True, retry=False)
            artifact = gone.stored.id if gone.stored else None
            self._finish(End(verdict, gone.message), lambda tx: forget_work(tx, artifact))
            return None
        except OSError as error:
            self._finish(End(Verdict(Outcome.LOST, cause_of(error)), f"staging failed: {error}"))
            return None
        for sentence in rejected:
            self._note("checkpoint_rejected", sentence)
        argv, environment = runner_command(errand, self._workdir, settings)
        return start_guard(
            self._workdir,
            argv,
            environment,
            deadline=self._control.deadline,
            grace_s=settings.lease_grace_s,
            cores=errand.cores or None,
        )

    def _watch(self, link: GuardLink) -> RunnerEnd:
        """Ship each second until the guard has seen the runner's end."""
        started, shipped_at = False, time.monotonic()
        silence = Silence(self._workdir)
        while (end := link.exit()) is None:
            if not link.alive():
                return link.exit() or self._end_of_a_lost_guard()
            if not started and link.runner_pid() is not None:
                started = self._try(lambda tx: attempts.report_started(tx, self.ref))
            if time.monotonic() - shipped_at >= SHIP_EVERY_S:
                shipped_at = time.monotonic()
                self._ship_for_now()
                if silence.seconds() > self._node.settings.stall_s:
                    self._stalled = True
                    self._control.end()
            time.sleep(LOOK_EVERY_S)
        if not started:
            self._try(lambda tx: attempts.report_started(tx, self.ref))
        return end

    def _end_of_a_lost_guard(self) -> RunnerEnd:
        """No guard: its exit.json says how it ended, or what is left is killed by its mark."""
        self._left()
        return read_exit(self._workdir) or RunnerEnd()

    def _left(self) -> set[int]:
        """Kill all of the attempt; the pids that are there nevertheless."""
        return still_there(self._workdir, show_id("attempt", self.ref.id))

    # From the runner's end to the attempt's ----------------------------------------------------

    def _conclude(self, end: RunnerEnd) -> None:
        """The runner is gone: free the devices, ship the rest, publish, end the attempt.

        The devices come first: shipping may have to wait for the store.
        """
        state = "cleaning" if self._all_gone() else "unconfirmed"
        self._until_written(lambda tx: attempts.release_devices(tx, self.ref, device_state=state))
        self._ship_rest()
        verdict = judge(end)
        words = read_last_words(self._workdir)
        if verdict.outcome is Outcome.SUCCEEDED:
            self._publish()
        else:
            evidence, patch = words.evidence(end)
            self.wanted_bytes = words.wanted_bytes
            if self._stalled:
                verdict = after_stall(verdict)
                evidence = f"the runner wrote nothing for {self._node.settings.stall_s:g} s"
            self._finish(End(verdict, evidence, patch))

    def _all_gone(self) -> bool:
        """Hold the devices until no process of the attempt is left, but not for ever."""
        give_up_at = time.monotonic() + HELD_TOO_LONG_S
        while left := self._left():
            if time.monotonic() > give_up_at or self._control.fenced.wait(LOOK_EVERY_S):
                fields = {"event": "unkillable", "pids": sorted(left), **self._fields()}
                log.warning("processes outlive SIGKILL", extra=fields)
                return False
        return True

    def _publish(self) -> None:
        try:
            folder, record = self._until_stored(
                lambda: publish(
                    self._node.store, self.ref, self.kind, self._workdir, recorded=self._recorded
                )
            )
        except OutputNotWhole as error:
            verdict = Verdict(Outcome.FAILED, Cause.BUG, charged=True)
            self._finish(End(verdict, error.message))
            return
        except StoreUnreachable as away:
            verdict = Verdict(Outcome.LOST, Cause.STORE_UNREACHABLE)
            self._finish(End(verdict, f"the result could not be stored: {away}"))
            return
        except OSError as error:
            verdict = Verdict(Outcome.LOST, cause_of(error))
            self._finish(End(verdict, f"the result could not be stored: {error}"))
            return
        if self.kind == "download" and folder is not None:
            # What was brought here is in the cache by a rename, for the jobs that wait for it.
            adopt(self._node.cache, self._workdir / OUTPUT, folder.digest)
        try:
            self._finish(End(Verdict(Outcome.SUCCEEDED)), record)
        except Conflict as taken:  # another source was first with this name
            verdict = Verdict(Outcome.FAILED, Cause.BAD_SPEC, charged=True, retry=False)
            self._finish(End(verdict, f"{taken.message} {taken.hint}"))

    def _recorded(self, digest: str) -> UUID | None:
        job = self.ref.job_id
        return self._until_written(lambda tx: recorded_base_model(tx, job, digest))

    def _finish(
        self,
        end: End,
        record: Callable[[Connection], None] | None = None,
        *,
        device_state: str = "cleaning",
    ) -> None:
        """End the attempt, with what it brought forth, in one transaction."""
        end = replace(end, exit=read_exit_report(self._workdir) or None)

        def unit(tx: Connection) -> Verdict:
            return attempts.finish_attempt(
                tx,
                self.ref,
                end,
                record=record,
                backoff_s=self._node.settings.retry_backoff_s,
                device_state=device_state,
            )

        self.verdict = self._until_written(unit)
        fields = {"event": "attempt_ended", "outcome": self.verdict.outcome, **self._fields()}
        log.info("attempt ended", extra=fields)
        if self.verdict.outcome is not Outcome.FAILED:
            remove_work(self._workdir)

    def _give_up(self, evidence: str) -> None:
        """End as lost; if even that fails the lease runs out and the reaper ends it."""
        self._control.fence()
        state = "unconfirmed" if self._left() else "cleaning"
        try:
            self._finish(End(Verdict(Outcome.LOST, Cause.KILLED), evidence), device_state=state)
        except (TuneyardError, OSError):
            log.exception("giving up failed", extra={"event": "keeper_failed", **self._fields()})

    def _abandon(self) -> None:
        """The token opens nothing any more: kill, remove, and say that a write was refused."""
        self._control.fence()
        self._left()
        self._try(lambda tx: attempts.refuse_write(tx, self.ref, "the attempt is over"))
        remove_work(self._workdir)
        log.warning("attempt abandoned", extra={"event": "attempt_abandoned", **self._fields()})

    # Writing --------------------------------------------------------------------------------------

    def _ship_for_now(self) -> None:
        """Ship what is new; a database or a store that is away is asked again the next time."""
        try:
            ship_new(self._node.db, self._node.store, self.ref, self._workdir)
        except Unavailable:
            pass

    def _ship_rest(self) -> None:
        """Ship to the end of all files, without the checkpoints if the store stays away."""
        try:
            self._until_stored(lambda: self._ship_all(self._node.store))
        except StoreUnreachable:
            self._ship_all(None)

    def _ship_all(self, store: Store | None) -> None:
        while True:
            try:
                if not ship_new(self._node.db, store, self.ref, self._workdir):
                    return
            except StoreUnreachable:
                raise
            except Unavailable:
                self._wait(0.5)

    def _note(self, type_: str, message: str) -> None:
        self._try(lambda tx: attempts.note(tx, self.ref, type_, {"message": message}))

    def _try(self, unit: Callable[[Connection], object]) -> bool:
        try:
            with self._node.db.begin() as tx:
                unit(tx)
        except Unavailable:
            return False
        return True

    def _until_written(self, unit: Callable[[Connection], Answer]) -> Answer:
        """Run a transaction, again while the database is away. Raises: StaleToken when fenced."""

        def transact() -> Answer:
            with self._node.db.begin() as tx:
                return unit(tx)

        return self._until_answered(transact)

    def _until_answered(self, ask: Callable[[], Answer]) -> Answer:
        """Ask again while the database is away. Raises: StaleToken when fenced."""
        while True:
            try:
                return ask()
            except Unavailable:
                self._wait(0.5)

    def _until_stored(self, work: Callable[[], Answer]) -> Answer:
        """Do what needs the store, again while it is away, for as long as patience lasts.

        Raises: StoreUnreachable, StaleToken when fenced. Who was asked to stop waits no longer.
        """
        give_up_at = time.monotonic() + self._node.settings.store_patience_s
        pause_s = STORE_PAUSE_S
        while True:
            try:
                return work()
            except StoreUnreachable as away:
                if time.monotonic() > give_up_at or self._control.stop_reason is not None:
                    raise
                fields = {"event": "store_awaited", "error": str(away), **self._fields()}
                log.warning("store awaited", extra=fields)
                self._wait(pause_s)
                pause_s = min(2 * pause_s, MAX_STORE_PAUSE_S)

    def _wait(self, seconds: float) -> None:
        if self._control.fenced.wait(seconds):
            raise StaleToken() from None

    def _fields(self) -> dict[str, object]:
        return {
            "job": show_id("job", self.ref.job_id),
            "attempt": self.ref.number,
            "token": self.ref.token,
        }


class Silence:
    """How long a runner has written neither an event nor a line of its log."""

    def __init__(self, workdir: Path) -> None:
        self._files = [workdir / EVENTS_FILE, workdir / LOG_FILE]
        self._written, self._since = self._bytes(), time.monotonic()

    def seconds(self) -> float:
        """Seconds since the files last grew."""
        written = self._bytes()
        if written != self._written:
            self._written, self._since = written, time.monotonic()
        return time.monotonic() - self._since

    def _bytes(self) -> int:
        return sum(file.stat().st_size for file in self._files if file.exists())


class Control:
    """What the supervisor's threads say to a keeper's runner: extend, stop, kill.

    Saying it takes no time: a thread of its own tells the guard, and tells a silent one again.
    """

    def __init__(self, settings: Settings, renewed_at: float, *, name: str) -> None:
        self.fenced = threading.Event()
        self.stop_reason: StopReason | None = None
        self.deadline = 0.0
        self._grace_s = math.inf  # until SIGKILL, once somebody wants the end
        self._settings = settings
        self._changed = threading.Condition()
        self._news, self._closed = False, False
        self._name = name
        self.renewed(renewed_at)

    def attach(self, link: GuardLink) -> None:
        """There is a guard now: tell it all that was said before, and what comes."""
        self._say()
        thread = threading.Thread(target=self._tell_often, args=(link,), name=f"tell-{self._name}")
        thread.daemon = True
        thread.start()

    def close(self) -> None:
        """There is nobody to tell anything any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def renewed(self, requested_at: float) -> None:
        """Trust the lease from the moment the request was sent, however late the answer came."""
        self.deadline = requested_at + self._settings.lease_s - self._settings.lease_margin_s
        self._say()

    def fence(self) -> None:
        """Kill at once."""
        self.fenced.set()
        self._say(grace_s=0.0)

    def end(self) -> None:
        """End a runner that does not answer, without a wish of anybody's."""
        self._say(grace_s=self._settings.lease_grace_s)

    def stop(self, reason: StopReason) -> None:
        """Ask for a checkpoint and the end; the first asking counts."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._say(grace_s=self._settings.stop_grace_s)

    def _say(self, *, grace_s: float = math.inf) -> None:
        with self._changed:
            self._grace_s = min(self._grace_s, grace_s)
            self._news = True
            self._changed.notify()

    def _tell_often(self, link: GuardLink) -> None:
        told_grace_s = math.inf
        while self._wait_for_news():
            grace_s = self._grace_s
            try:
                if grace_s < told_grace_s:
                    link.stop(grace_s)
                    told_grace_s = grace_s
                link.extend(self.deadline)
            except GuardSilent:
                time.sleep(LOOK_EVERY_S)
                self._say()  # should it never answer, it ends everything at its deadline
            except GuardGone:
                pass  # the keeper finds out

    def _wait_for_news(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._closed)
            self._news = False
            return not self._closed
