"""Checking uploads: a thread that takes unchecked files one by one, each in a child process."""

import logging
import threading

from tuneyard.api.access import Yard
from tuneyard.checks.limits import check_file
from tuneyard.models import files
from tuneyard.models.dependencies import reconsider_blocked
from tuneyard.specs.errors import Unavailable

log = logging.getLogger(__name__)

CLAIM_S = 660.0
"""A check takes 600 s at most; an API process that died in one lets another take it after this."""

LOOK_EVERY_S = 2.0


class FileChecker:
    """One checker a process; files wait their turn."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self._woken, self._stopping = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="check-files", daemon=True).start()

    def wake(self) -> None:
        """There is a new file."""
        self._woken.set()

    def stop(self) -> None:
        """End after the file in hand."""
        self._stopping.set()
        self._woken.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                while self.check_one():
                    pass
            except Unavailable:
                pass  # asked again in a moment
            except Exception:
                log.exception("checking failed", extra={"event": "check_failed"})
            self._woken.wait(LOOK_EVERY_S)
            self._woken.clear()

    def check_one(self) -> bool:
        """Check one file and free the jobs that wait for it; False when none is left."""
        with self._yard.db.begin() as tx:
            file = files.claim_file(tx, seconds=CLAIM_S)
        if file is None:
            return False
        path = self._yard.store.file(file.id)
        report = check_file(path, purpose=file.purpose)
        with self._yard.db.begin(team=file.team_id) as tx:
            files.finish_check(tx, file.id, report, accepted=bool(report["ok"]))
            reconsider_blocked(tx)
        return True
