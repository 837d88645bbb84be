"""The scheduler's process: lead, reap, place, hint; again when woken or after a tick."""

import logging
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field

from sqlalchemy.exc import IntegrityError

from tuneyard.models import dependencies, placements
from tuneyard.models.engine import Database
from tuneyard.models.events import SCHEDULER_CHANNEL
from tuneyard.models.leadership import lead, resign
from tuneyard.models.node_cache import nodes_with
from tuneyard.scheduler.hints import HintPublisher
from tuneyard.scheduler.placing import plan
from tuneyard.specs.beats import beat
from tuneyard.specs.errors import StaleToken, Unavailable
from tuneyard.specs.settings import Settings

log = logging.getLogger(__name__)

TERM_S = 5.0
"""So long a leader leads without being renewed."""

LOOK_AT = 500
"""So many queued jobs are looked at in one tick."""

REHINT_AFTER_S = 1.0


def new_holder() -> str:
    """A name that no other scheduler process has ever had."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


@dataclass
class Scheduler:
    """One scheduler. Ten may run: one leads, the others wait for its term to end."""

    db: Database
    hints: HintPublisher
    settings: Settings
    holder: str = field(default_factory=new_holder)
    connected_at: float = field(default_factory=time.monotonic)
    hinted: dict[object, float] = field(default_factory=dict)
    leads: bool = False

    def tick(self) -> int:
        """Do once all that a leader does; returns how many jobs were placed."""
        with self.db.begin() as tx:
            epoch = lead(tx, self.holder, term_s=TERM_S)
        if self.leads != (epoch is not None):
            self.leads = epoch is not None
            log.info("lead taken" if self.leads else "lead lost", extra={"event": "leadership"})
        if epoch is None:
            return 0
        self.reap(epoch)
        with self.db.begin() as tx:
            placements.stop_overdue(tx, epoch=epoch)
            decided = dependencies.decided_jobs(tx)
        for job_id in decided:
            with self.db.begin() as tx:
                dependencies.reconsider(tx, job_id)
        placed = self.place(epoch)
        self.hint_again()
        return placed

    def reap(self, epoch: int) -> None:
        """End attempts whose lease ran out, unless it is rather we who could not see."""
        lease_s = self.settings.lease_s
        with self.db.begin() as tx:
            heard = placements.silence(tx, lease_s=lease_s)
            expired = placements.expired(tx)
        seeing_s = min(heard.database_up_s, time.monotonic() - self.connected_at)
        if not expired or seeing_s < lease_s:
            return
        if heard.mass_silence():
            log.warning("most nodes are silent: nobody is reaped", extra={"event": "mass_silence"})
            return
        for ref in expired:
            with self.db.begin() as tx:
                state = placements.reap(
                    tx, ref, epoch=epoch, backoff_s=self.settings.retry_backoff_s
                )
            if state is not None:
                fields = {"event": "attempt_lost", "attempt": str(ref.id), "state": state}
                log.warning("attempt lost", extra=fields)
                self.hints.report_lost(ref)

    def place(self, epoch: int) -> int:
        """Place what fits, in one transaction a job, and say why the rest waits."""
        with self.db.begin() as tx:
            queued = placements.queue(tx, limit=LOOK_AT)
            if not queued:
                return 0
            free = placements.free_slots_now(tx, silence_s=self.settings.lease_s)
            capacity = placements.capacity(tx)
            cached = nodes_with(tx, {digest for job in queued for digest in job.digests})
        decided = plan(queued, free, capacity, cached=cached)
        placed = [p for p in (self._commit(*each, epoch) for each in decided.placements) if p]
        for each in placed:
            self.hints.send(each)
        with self.db.begin() as tx:
            placements.set_wait_reasons(tx, dict(decided.wait_reasons))
        return len(placed)

    def _commit(
        self, job: placements.QueuedJob, chosen: placements.Placement, epoch: int
    ) -> placements.Placed | None:
        try:
            with self.db.begin() as tx:
                return placements.place_job(
                    tx, job, chosen, epoch=epoch, lease_s=self.settings.lease_s
                )
        except IntegrityError:
            # The slot was taken meanwhile: the constraint decides, the next tick sees.
            return None

    def hint_again(self) -> None:
        """Hint once more at placements that nobody claimed: hints get lost without any fault."""
        with self.db.begin() as tx:
            forgotten = placements.unclaimed(tx, age_s=REHINT_AFTER_S)
        now = time.monotonic()
        self.hinted = {p.ref.id: self.hinted.get(p.ref.id, 0.0) for p in forgotten}
        for each in forgotten:
            if now - self.hinted[each.ref.id] > REHINT_AFTER_S:
                self.hinted[each.ref.id] = now
                self.hints.send(each)


def run(settings: Settings, stop: threading.Event) -> None:
    """Schedule until asked to stop; a database that is away is waited for."""
    db = Database(settings.database_url.get_secret_value(), "ty-scheduler", pool_size=2)
    hints = HintPublisher(settings.broker_url.get_secret_value())
    woken = threading.Event()
    threading.Thread(target=_listen, args=(db, woken, stop), name="listen", daemon=True).start()
    scheduler = Scheduler(db, hints, settings)
    away = False
    while not stop.is_set():
        beat(settings, "scheduler")
        try:
            scheduler.tick()
            if away:
                away = False
                log.warning("database is back", extra={"event": "database_back"})
        except Unavailable as error:
            if not away:
                log.warning(error.message, extra={"event": "database_away", "code": error.code})
            away = True
            # Whoever could not be heard through us gets a lease's time to be heard again.
            scheduler.connected_at = time.monotonic()
        except StaleToken:
            log.warning("lead lost within a tick", extra={"event": "leadership"})
        woken.wait(settings.tick_s * random.uniform(0.8, 1.0))  # noqa: S311 - jitter
        woken.clear()
    _resign(scheduler)
    hints.close()
    db.close()


def _resign(scheduler: Scheduler) -> None:
    try:
        with scheduler.db.begin() as tx:
            resign(tx, scheduler.holder)
    except Unavailable:
        pass  # the term ends by itself


def _listen(db: Database, woken: threading.Event, stop: threading.Event) -> None:
    """Set ``woken`` at each NOTIFY; a lost connection is made anew."""
    while not stop.is_set():
        try:
            with db.listener() as connection:
                connection.execute(f"LISTEN {SCHEDULER_CHANNEL}")
                while not stop.is_set():
                    for _ in connection.notifies(timeout=1.0, stop_after=1):
                        woken.set()
        except Exception as error:
            log.debug("listener lost", extra={"event": "listener_lost", "error": str(error)})
            stop.wait(1.0)
