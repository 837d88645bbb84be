"""Checking uploads: a thread that takes unchecked files one by one, each in a child process."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from sqlalchemy import Connection

from tuneyard.api.access import Yard
from tuneyard.api.submissions import check_inputs
from tuneyard.checks.limits import check_file
from tuneyard.models import files
from tuneyard.models.dependencies import jobs_waiting_for_file, reconsider, refuse, spec_of
from tuneyard.specs.errors import SpecRejected, Unavailable

log = logging.getLogger(__name__)

CLAIM_S = 30.0
"""When an API process dies in a check, another takes the file after so long."""

RENEW_EVERY_S = 10.0
LOOK_EVERY_S = 2.0
END_WITHIN_S = 5.0


class FileChecker:
    """One checker a process; files wait their turn."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self._woken, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="check-files", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There is a new file."""
        self._woken.set()

    def stop(self) -> None:
        """End after the file in hand; a large one is left to another process, or the next."""
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(END_WITHIN_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                while not self._stopping.is_set() and self.check_one():
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
        with self._claim_kept(file), self._yard.store.file_here(file.id) as path:
            report = check_file(path, purpose=file.purpose)
        with self._yard.db.begin(team=file.team_id) as tx:
            files.finish_check(tx, file.id, report, accepted=bool(report["ok"]))
            decide_waiting(tx, self._yard, file.id)
        return True

    @contextmanager
    def _claim_kept(self, file: files.FileToCheck) -> Iterator[None]:
        """Renew the claim while a large file is read."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(RENEW_EVERY_S):
                try:
                    with self._yard.db.begin(team=file.team_id) as tx:
                        files.extend_claim(tx, file.id, seconds=CLAIM_S)
                except Unavailable:
                    continue

        renewing = threading.Thread(target=renew, name="renew-claim", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()


def decide_waiting(tx: Connection, yard: Yard, file_id: UUID) -> None:
    """Free the jobs that waited for a file's check, or end those that it does not fit."""
    for job_id, document, inputs in jobs_waiting_for_file(tx, file_id):
        try:
            check_inputs(tx, yard, spec_of(document), inputs)
        except SpecRejected as problem:
            refuse(tx, job_id, problem)
        else:
            reconsider(tx, job_id)
