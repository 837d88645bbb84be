"""One thin method for each thing the API does; retries only where asking twice is safe."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx

from tuneyard.specs.errors import TuneyardError

TIMEOUT_S = 30.0
TRIES = 5
FIRST_PAUSE_S = 0.2
STREAM_SILENCE_S = 60.0
TERMINAL = ("succeeded", "failed", "cancelled")


class Refused(TuneyardError):
    """The server refused."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(
            str(error.get("message", f"the server answered {status}")),
            code=str(error.get("code", "refused")),
            field=error.get("field"),
            line=error.get("line"),
            hint=error.get("hint"),
        )
        self.status = status
        self.details = list(error.get("details") or [])


class Unreachable(TuneyardError):
    """The server cannot be reached."""

    code = "unreachable"


class Client:
    """A connection to one server as one team."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/")
        # A proxy of the environment has no business with a server on this machine.
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.url + "/api/v1",
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=TIMEOUT_S,
            trust_env=not local,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Jobs ---------------------------------------------------------------------------------------

    def submit(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a job. A key of our own makes asking again after a lost answer safe."""
        return self._send("POST", "/jobs", json=document, key=uuid4().hex)

    def jobs(self, **filters: Any) -> list[dict[str, Any]]:
        """A page of jobs, newest first."""
        params = {name: value for name, value in filters.items() if value is not None}
        return list(self._send("GET", "/jobs", params=params)["data"])

    def job(self, job: str) -> dict[str, Any]:
        """One job."""
        return self._send("GET", f"/jobs/{quote(job, safe='')}")

    def cancel(self, job: str) -> dict[str, Any]:
        """Cancel a job."""
        return self._send("POST", f"/jobs/{quote(job, safe='')}/cancel")

    def retry(
        self, job: str, *, patch: Mapping[str, Any], from_scratch: bool = False
    ) -> dict[str, Any]:
        """Try an ended job again, as a new job."""
        body = {"patch": dict(patch), "from_scratch": from_scratch}
        return self._send("POST", f"/jobs/{quote(job, safe='')}/retry", json=body, key=uuid4().hex)

    def events(self, job: str, *, after: int = 0) -> list[dict[str, Any]]:
        """Lines of a job's timeline."""
        path = f"/jobs/{quote(job, safe='')}/events"
        return list(self._send("GET", path, params={"after": after})["data"])

    def metrics(self, job: str) -> list[dict[str, Any]]:
        """What was measured, by step."""
        return list(self._send("GET", f"/jobs/{quote(job, safe='')}/metrics")["data"])

    def logs(self, job: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """The log, piece by piece."""
        params: dict[str, Any] = {"follow": 1} if follow else {}
        if tail is not None:
            params["tail"] = tail
        path = f"/jobs/{quote(job, safe='')}/logs"
        timeout = httpx.Timeout(TIMEOUT_S, read=None if follow else TIMEOUT_S)
        try:
            with self._http.stream("GET", path, params=params, timeout=timeout) as answer:
                self._check(answer)
                yield from answer.iter_text()
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    def watch(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, data) of every event to the job's end; a lost stream goes on where it broke off.

        Numbered events come once each; ``progress`` comes as it changes.
        """
        seen = 0
        silent_since = time.monotonic()
        while True:
            try:
                for number, kind, data in self._stream(job, seen):
                    seen = number or seen
                    silent_since = time.monotonic()
                    yield kind, data
                    if data.get("to_state") in TERMINAL:
                        return
                if self.job(job)["state"] in TERMINAL and not self.events(job, after=seen):
                    return
            except (Unreachable, httpx.TransportError):
                if time.monotonic() - silent_since > STREAM_SILENCE_S:
                    raise Unreachable(f"{self.url} does not answer any more.") from None
            time.sleep(FIRST_PAUSE_S)

    def _stream(self, job: str, after: int) -> Iterator[tuple[int | None, str, dict[str, Any]]]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(TIMEOUT_S, read=STREAM_SILENCE_S)
        path = f"/jobs/{quote(job, safe='')}/events"
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            self._check(answer)
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    number = int(fields["id"]) if fields.get("id") else None
                    yield number, fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}
                else:
                    fields = {}

    # Files and artifacts -------------------------------------------------------------------------

    def put_file(self, path: Path, *, purpose: str = "dataset") -> dict[str, Any]:
        """Upload a file, unless the same bytes under the same name are there already."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for known in self.files():
            same = known["sha256"] == digest and known["name"] == path.name
            if same and known["purpose"] == purpose:
                return known
        with path.open("rb") as file:
            files = {"file": (path.name, file)}
            data = {"purpose": purpose, "sha256": digest}
            return self._send("POST", "/files", files=files, data=data)

    def files(self) -> list[dict[str, Any]]:
        """The team's files, newest first."""
        return list(self._send("GET", "/files", params={"limit": 200})["data"])

    def file(self, file_id: str) -> dict[str, Any]:
        """One file, with its check's report."""
        return self._send("GET", f"/files/{quote(file_id, safe='')}")

    def remove_file(self, file_id: str) -> dict[str, Any]:
        """Delete a file."""
        return self._send("DELETE", f"/files/{quote(file_id, safe='')}")

    def artifacts(self, job: str) -> list[dict[str, Any]]:
        """What a job brought forth."""
        return list(self._send("GET", f"/jobs/{quote(job, safe='')}/artifacts")["data"])

    def artifact_files(self, job: str, artifact: str) -> list[dict[str, Any]]:
        """The files of an artifact, with size and sha256."""
        return list(self._send("GET", f"/jobs/{job}/artifacts/{artifact}/files")["data"])

    def read_artifact_file(self, job: str, artifact: str, name: str) -> bytes:
        """A small file of an artifact."""
        path = f"/jobs/{job}/artifacts/{artifact}/files/{quote(name)}"
        return self._answer("GET", path).content

    def fetch_artifact(self, job: str, artifact: str, target: Path) -> list[Path]:
        """Download an artifact; each file is checked and appears whole."""
        fetched = []
        for entry in self.artifact_files(job, artifact):
            path = target / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(
                f"/jobs/{job}/artifacts/{artifact}/files/{quote(entry['path'])}", entry, path
            )
            fetched.append(path)
        return fetched

    def _fetch(self, url: str, entry: Mapping[str, Any], path: Path) -> None:
        aside = path.with_name(f".{path.name}.{uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", url) as answer, aside.open("wb") as file:
                self._check(answer)
                for piece in answer.iter_bytes():
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != entry["sha256"]:
                raise Refused(0, {"code": "checksum_mismatch", "message": f"{path} arrived broken"})
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    # The rest ------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Base models and the team's tuned ones."""
        return list(self._send("GET", "/models")["data"])

    def model(self, name: str) -> dict[str, Any]:
        """One model by name or id."""
        return self._send("GET", f"/models/{quote(name)}")

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes with their devices."""
        return list(self._send("GET", "/nodes")["data"])

    def _send(
        self, method: str, path: str, *, key: str | None = None, **request: Any
    ) -> dict[str, Any]:
        headers = {"Idempotency-Key": key} if key else {}
        answer: dict[str, Any] = self._answer(method, path, headers=headers, **request).json()
        return answer

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response:
        safe = method == "GET" or bool(request.get("headers"))
        pause = FIRST_PAUSE_S
        for left in range(TRIES if safe else 1, 0, -1):
            try:
                answer = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                if left == 1 or isinstance(error, httpx.ConnectError):
                    raise self._unreachable(error) from None
            else:
                if answer.status_code != 503 or left == 1:
                    return self._check(answer)
                pause = max(pause, float(answer.headers.get("Retry-After") or 0))
            time.sleep(pause)
            pause *= 2
        raise self._unreachable(None)

    def _unreachable(self, error: Exception | None) -> Unreachable:
        reason = f": {error}" if error else ""
        hint = "is it running? `tuneyard status` tells, `tuneyard up` starts it"
        return Unreachable(f"{self.url} cannot be reached{reason}.", hint=hint)

    def _check(self, answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        answer.read()
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": f"{self.url} answered {answer.status_code}: {answer.text[:200]}"}
        if answer.status_code == 503:
            raise Unreachable(str(error.get("message")), code=str(error.get("code", "unavailable")))
        raise Refused(answer.status_code, error)
