"""The serve job behind a chat: found or submitted, waited for, asked, asked again, ended."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from tuneyard.cli.output import plain_error
from tuneyard.cli.watching import describe, event_line, report_failure
from tuneyard.client import Client, Refused, Unreachable
from tuneyard.specs.errors import TuneyardError

PATIENCE_S = 60.0
"""So long a model that answered before may be unreachable."""

PAUSE_S = 0.5
BUSY_PAUSE_S = 2.0
FIND_AMONG = 100
ALIVE = "running,dispatched,queued,blocked"

AGAIN = frozenset({"not_ready", "busy", "ended"})
"""Refusals that are no answer to the question."""

BROKEN_OFF = frozenset({"stopping", "runner_away"})
"""Errors that end an answer through no fault of the question's."""

Message = Mapping[str, str]
Piece = tuple[str, Mapping[str, Any]]


class JobOver(Exception):
    """The serve job failed, or was cancelled before it was ready; that was said."""


class ServedModel:
    """A model that a serve job keeps loaded, across whatever happens to the job meanwhile."""

    def __init__(
        self, client: Client, document: Mapping[str, Any], *, tell: Callable[[str], None]
    ) -> None:
        self._client, self._document, self._tell = client, dict(document), tell
        self._ours: list[str] = []
        self._seen, self._ready, self._was_ready = 0, False, False
        self.job = self._find() or self._submit()

    def _find(self) -> str | None:
        """A job of the team's that serves the same; not one of a base that has changed since."""
        alive = self._client.jobs(kind="serve", state=ALIVE, limit=FIND_AMONG)
        same = [job for job in alive if _asked(job["spec"]) == _asked(self._document)]
        if not same:
            return None
        model = self._client.model(str(self._document["model"]))
        meant = {model["id"], model.get("artifact")}
        for job in same:
            if job["inputs"] is None or meant & set(job["inputs"].values()):
                self._seen = max(line["seq"] for line in self._client.events(job["id"]))
                self._tell(f"joins {job['id']}, which serves {self._document['model']} already")
                return str(job["id"])
        return None

    def _submit(self) -> str:
        job = self._client.submit(self._document)
        self._ours.append(job["id"])
        self._seen, self._was_ready = 0, False
        self._tell(f"{job['id']}  {job['name']}  {job['state']}")
        for note in job.get("notes") or []:
            self._tell(f"note: {note['message']}")
        return str(job["id"])

    def wait(self) -> None:
        """Until it is ready, saying what happens. Raises: JobOver, Unreachable."""
        said = ""
        while not self._ready:
            for kind, data in self._client.watch(self.job, after=self._seen):
                self._seen = max(self._seen, data.get("seq") or 0)
                if kind == "progress" and _listens(data):
                    self._ready = self._was_ready = True
                    return
                line = describe(data) if kind == "progress" else event_line(kind, data)
                if line and line != said:
                    said = line
                    self._tell(line)
            self._start_again()

    def _start_again(self) -> None:
        """The job has ended. One that answered before may have been idle for too long."""
        ended = self._client.job(self.job)
        ours = self.job in self._ours
        if ended["state"] == "failed" or (ours and not self._was_ready):
            report_failure(ended)
            raise JobOver
        self._tell(f"{self.job} {ended['state']}: the model is loaded again")
        self.job = self._submit()

    def ask(
        self, messages: Sequence[Message], settings: Mapping[str, Any]
    ) -> Generator[Piece, None, None]:
        """The pieces of an answer; ``again`` where it broke off and begins anew.

        Raises: Refused for a question that cannot be answered, Unreachable, JobOver.
        """
        said, away_since = "", None
        while True:
            self.wait()
            begun, pause_s = False, PAUSE_S
            try:
                for kind, data in self._client.chat(self.job, messages, **settings):
                    away_since = None
                    if kind == "error":
                        raise _error_of(data)
                    begun = begun or kind == "delta"
                    yield kind, data
                    if kind == "done":
                        return
                raise Unreachable("The answer broke off.")
            except Refused as refused:
                if refused.code not in AGAIN:
                    raise
                reason: TuneyardError = refused
                self._ready = refused.code == "busy"
                pause_s = BUSY_PAUSE_S if self._ready else PAUSE_S
            except Unreachable as unreachable:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_S:
                    raise
                reason, self._ready = unreachable, False
            if begun:
                yield "again", {"reason": reason.message}
            elif reason.message != said:
                self._tell(reason.message)
            said = reason.message
            time.sleep(pause_s)

    def end(self) -> None:
        """End what this chat began; a job that was found is others' affair."""
        for job in self._ours[-1:]:
            try:
                self._drain(job)
            except Refused:
                pass  # it has ended
            except Unreachable as error:
                plain_error(f"{error.message} {job} ends by itself once nobody asks any more.")

    def _drain(self, job: str) -> None:
        try:
            self._client.drain(job)
        except Unreachable:
            self._client.cancel(job)


def _asked(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name != "name"}


def _listens(data: Mapping[str, Any]) -> bool:
    return data.get("state") == "running" and data.get("phase") == "running"


def _error_of(data: Mapping[str, Any]) -> TuneyardError:
    error = data["error"]
    if error.get("code") in BROKEN_OFF:
        return Unreachable(str(error["message"]), code=str(error["code"]))
    return Refused(422, error)
