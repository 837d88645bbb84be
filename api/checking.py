"""Checking uploads: each in a child process, small ones beside a large one.

One thread claims what is unchecked and checks the small ones itself, in their order; large ones
it hands to a second thread. So nobody's six lines wait behind three million rows.
"""

import logging
import queue
import threading
import time
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
SMALL_BYTES = 4 * 1024**2
"""A check of so much takes about a second."""


class FileChecker:
    """Two checkers a process, one of them for small files alone."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self._woken, self._stopping = threading.Event(), threading.Event()
        self._large: queue.SimpleQueue[files.FileToCheck | None] = queue.SimpleQueue()
        self._held: dict[UUID, files.FileToCheck] = {}
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (
                ("check-files", self._run),
                ("check-large", self._run_large),
                ("renew-claims", self._renew),
            )
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There is a new file."""
        self._woken.set()

    def stop(self) -> None:
        """End after the files in hand; large ones are left to another process, or the next."""
        self._stopping.set()
        self._woken.set()
        self._large.put(None)
        deadline = time.monotonic() + END_WITHIN_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._extend(seconds=0.0)

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

    def _run_large(self) -> None:
        while (file := self._large.get()) is not None and not self._stopping.is_set():
            try:
                self._check(file)
            except Unavailable:
                pass  # its claim runs out, and it is taken again
            except Exception:
                log.exception("checking failed", extra={"event": "check_failed"})

    def check_one(self) -> bool:
        """Claim a file; check it, or let it wait among the large. False when none is left."""
        with self._yard.db.begin() as tx:
            file = files.claim_file(tx, seconds=CLAIM_S)
        if file is None:
            return False
        self._held[file.id] = file
        if self._is_large(file):
            self._large.put(file)
        else:
            self._check(file)
        return True

    def _is_large(self, file: files.FileToCheck) -> bool:
        with self._yard.db.begin(team=file.team_id) as tx:
            return files.bytes_of(tx, file.id) > SMALL_BYTES

    def _is_plain(self, file: files.FileToCheck) -> bool:
        with self._yard.db.begin(team=file.team_id) as tx:
            return files.name_of(tx, file.id).lower().endswith(".txt")

    def _check(self, file: files.FileToCheck) -> None:
        """Check a file and free the jobs that wait for it."""
        try:
            with self._yard.store.file_here(file.id) as path:
                report = check_file(path, purpose=file.purpose, plain=self._is_plain(file))
            with self._yard.db.begin(team=file.team_id) as tx:
                files.finish_check(tx, file.id, report, accepted=bool(report["ok"]))
                decide_waiting(tx, self._yard, file.id)
        finally:
            self._held.pop(file.id, None)

    def _renew(self) -> None:
        while not self._stopping.wait(RENEW_EVERY_S):
            self._extend(seconds=CLAIM_S)

    def _extend(self, *, seconds: float) -> None:
        """Keep what is claimed for longer; with 0 another may take it at once."""
        for file in list(self._held.values()):
            try:
                with self._yard.db.begin(team=file.team_id) as tx:
                    files.extend_claim(tx, file.id, seconds=seconds)
            except Unavailable:
                return


def decide_waiting(tx: Connection, yard: Yard, file_id: UUID) -> None:
    """Free the jobs that waited for a file's check, or end those that it does not fit."""
    for job_id, document, inputs in jobs_waiting_for_file(tx, file_id):
        try:
            check_inputs(tx, yard, spec_of(document), inputs)
        except SpecRejected as problem:
            refuse(tx, job_id, problem)
        else:
            reconsider(tx, job_id)
