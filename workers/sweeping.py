"""What a worker tidies beside its attempts: work folders, the store's remains, logs that ended.

Everything here may be done by several workers at once, or twice, or half.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tuneyard.models import artifacts
from tuneyard.models.engine import Database
from tuneyard.specs.errors import Unavailable
from tuneyard.store.shelves import FORGOTTEN_S, Place, Store
from tuneyard.workers import cache
from tuneyard.workers.archiving import LogArchiver
from tuneyard.workers.staging import remove_work

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
LOOK_THROUGH_EVERY_S = 6 * 3600.0
"""The whole store is listed so often by each worker."""

WORK_KEPT_S = 24 * 3600
CLOCKS_APART_S = 3600.0
"""So far the clocks of store and database may lie apart."""

PLACES: tuple[Place, ...] = ("artifacts", "models", "files")
IDS_AT_ONCE = 500


@dataclass
class Sweeper:
    """The housekeeping of one worker, in a thread of its own: the store may be slow or away."""

    db: Database
    store: Store
    home: Path
    archiver: LogArchiver
    live: Callable[[], set[str]]  # names of work folders that are in use
    pins: Callable[[], set[str]]  # names of the cache's entries that are in use
    _woken: threading.Event = field(default_factory=threading.Event)
    _looked_through_at: float = field(
        # Not all workers at once, when they were started at once.
        default_factory=lambda: time.monotonic() - random.uniform(0, LOOK_THROUGH_EVERY_S)  # noqa: S311
    )

    def wake(self) -> None:
        """An attempt ended: its log can become one artifact."""
        self._woken.set()

    def run(self, stopping: threading.Event) -> None:
        """Tidy until told to stop: logs whenever an attempt ends, the rest once a minute."""
        swept_at = 0.0
        while not stopping.is_set():
            self._try(self.archiver.archive)
            if time.monotonic() - swept_at >= SWEEP_EVERY_S:
                swept_at = time.monotonic()
                self._try(self.sweep)
            self._woken.wait(SWEEP_EVERY_S)
            self._woken.clear()

    def _try(self, tidy: Callable[[], None]) -> None:
        try:
            tidy()
        except Unavailable as error:
            log.debug("tidied later", extra={"event": "tidied_later", "code": error.code})
        except Exception:
            log.exception("tidying failed", extra={"event": "tidying_failed"})

    def sweep(self) -> None:
        """Remove work folders that nobody needs, pruned artifacts, and what was half written."""
        live = self.live()
        for folder in (self.home / "work").iterdir():
            if folder.name not in live and time.time() - folder.stat().st_mtime > WORK_KEPT_S:
                remove_work(folder)
        cache.sweep(self.home / "cache", pins=self.pins)
        self.remove_pruned()
        if time.monotonic() - self._looked_through_at > LOOK_THROUGH_EVERY_S:
            self._looked_through_at = time.monotonic()
            self.store.sweep()
            remove_unrecorded(self.db, self.store)

    def remove_pruned(self) -> None:
        """Remove the files of artifacts that were marked, then say so."""
        with self.db.begin() as tx:
            pruned = artifacts.artifacts_to_sweep(tx)
        for artifact_id in pruned:
            self.store.remove_folder("artifacts", artifact_id)
        if pruned:
            with self.db.begin() as tx:
                artifacts.mark_swept(tx, pruned)


def remove_unrecorded(db: Database, store: Store, *, younger_s: float = FORGOTTEN_S) -> int:
    """Remove what lies in the store and no row knows; returns how many things.

    A row is written by the attempt that stored the folder, while it lives. So what is older than
    every live attempt will never have one: that, and not its age alone, makes it safe to remove.
    """
    removed = 0
    for place in PLACES:
        ids = store.ids(place)
        for start in range(0, len(ids), IDS_AT_ONCE):
            with db.begin() as tx:
                unknown = artifacts.unrecorded(tx, place, ids[start : start + IDS_AT_ONCE])
                oldest_s = artifacts.oldest_live_attempt_s(tx)
            too_young_s = max(younger_s, oldest_s + CLOCKS_APART_S if oldest_s else 0.0)
            for each in unknown:
                if store.age_s(place, each) > too_young_s:
                    log.info("left alone by all", extra={"event": "swept", place: each.hex})
                    if place == "files":
                        store.remove_file(each)
                    else:
                        store.remove_folder(place, each)
                    removed += 1
    return removed
