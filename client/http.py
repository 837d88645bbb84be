"""One thin method for each thing that the API does.

Answers are the JSON objects of specs/views.py, as they came: what a newer server adds is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from tuneyard.client.connection import Connection
from tuneyard.client.download import fetch, file_sha256, inside
from tuneyard.client.stream import SILENCE_S, follow_log, read_events, watch_events

Thing = dict[str, Any]

PAGE = 200
SEARCHED_FILES = 2000


class Client:
    """A connection to one server as one team. Every method raises Refused and Unreachable."""

    def __init__(self, url: str, api_key: str) -> None:
        self._connection = Connection(url, api_key)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._connection.url

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # Jobs ---------------------------------------------------------------------------------------

    def submit(self, document: Mapping[str, Any], *, key: str | None = None) -> Thing:
        """Submit a job. Its key, made here unless given, makes a second asking the same job."""
        return self._post("/jobs", json=document, key=key or uuid4().hex)

    def jobs(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        name: str | None = None,
        all_: bool = False,
        limit: int = 20,
    ) -> list[Thing]:
        """Jobs, newest first; with ``all_`` also those made for other jobs."""
        filters = {"state": state, "kind": kind, "name": name, "all": "true" if all_ else None}
        return list(self._pages("/jobs", limit, **filters))

    def job(self, job: str) -> Thing:
        """One job."""
        return self._get(_job(job))

    def cancel(self, job: str) -> Thing:
        """Cancel a job."""
        return self._post(f"{_job(job)}/cancel")

    def pipeline(self, pipeline: str) -> Thing:
        """A pipeline with its jobs."""
        return self._get(f"/pipelines/{_part(pipeline)}")

    def cancel_pipeline(self, pipeline: str) -> Thing:
        """Cancel all jobs of a pipeline that have not ended."""
        return self._post(f"/pipelines/{_part(pipeline)}/cancel")

    def retry(self, job: str, *, patch: Mapping[str, Any], from_scratch: bool = False) -> Thing:
        """Try an ended job again, as a new job."""
        body = {"patch": dict(patch), "from_scratch": from_scratch}
        return self._post(f"{_job(job)}/retry", json=body, key=uuid4().hex)

    def chat(
        self, job: str, messages: Sequence[Mapping[str, str]], **settings: Any
    ) -> Iterator[tuple[str, Thing]]:
        """Ask a served model: (kind, data) of waiting, delta…, and last done or error.

        To leave it early cancels the answer. One that breaks off raises Unreachable.
        """
        asked = {"messages": list(messages), **settings, "stream": True}
        with self._connection.stream(
            f"{_job(job)}/chat", method="POST", json=asked, silence_s=SILENCE_S
        ) as answer:
            for event in read_events(answer.iter_bytes()):
                yield event.kind, event.data

    def drain(self, job: str) -> Thing:
        """Let a serve job end as succeeded, once what it was asked is answered."""
        return self._post(f"{_job(job)}/drain")

    def events(self, job: str, *, after: int = 0) -> list[Thing]:
        """The lines of a job's timeline after a number."""
        return list(self._later(f"{_job(job)}/events", after))

    def metrics(self, job: str, *names: str) -> list[Thing]:
        """What was measured, by step; all of it, or what is named."""
        return list(self._later(f"{_job(job)}/metrics", name=names or None))

    def samples(self, job: str) -> list[Thing]:
        """What the model answered to its watch-prompts, by step."""
        return list(self._later(f"{_job(job)}/samples"))

    def logs(
        self,
        job: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        attempt: int | None = None,
    ) -> Iterator[str]:
        """The log, piece by piece; with ``follow`` to the job's end, whatever breaks between."""
        asked = {"tail": tail, "attempt": attempt}
        params = {name: value for name, value in asked.items() if value is not None}
        if follow:
            yield from follow_log(self._connection, _job(job), params)
            return
        with self._connection.stream(f"{_job(job)}/logs", params=params) as answer:
            yield from answer.iter_text()

    def watch(self, job: str, *, after: int = 0) -> Iterator[tuple[str, Thing]]:
        """(type, data) of every event to the job's end, whatever breaks between."""
        for event in watch_events(self._connection, _job(job), after=after):
            yield event.kind, event.data

    # Files --------------------------------------------------------------------------------------

    def put_file(self, path: Path, *, purpose: str = "dataset") -> Thing:
        """Upload a file, unless the same bytes under the same name are there already."""
        digest, name = file_sha256(path), path.name.encode("utf-8", "replace").decode()
        for known in self._pages("/files", SEARCHED_FILES):
            same = known["sha256"] == digest and known["name"] == name
            if same and known["purpose"] == purpose:
                return known
        with path.open("rb") as file:
            files = {"file": (name, file)}
            return self._post("/files", files=files, data={"purpose": purpose, "sha256": digest})

    def files(self, *, limit: int = PAGE) -> list[Thing]:
        """The team's files, newest first."""
        return list(self._pages("/files", limit))

    def file(self, file: str) -> Thing:
        """One file, with its check's report."""
        return self._get(f"/files/{_part(file)}")

    def fetch_file(self, file: str, path: Path) -> None:
        """Download an uploaded file again."""
        known = self.file(file)
        fetch(self._connection, f"/files/{_part(file)}/content", path, sha256=str(known["sha256"]))

    def remove_file(self, file: str) -> Thing:
        """Delete a file."""
        return self._connection.send("DELETE", f"/files/{_part(file)}")

    # What jobs brought forth ----------------------------------------------------------------------

    def artifacts(self, job: str) -> list[Thing]:
        """What a job brought forth."""
        return list(self._get(f"{_job(job)}/artifacts")["data"])

    def artifact_files(self, job: str, artifact: str) -> list[Thing]:
        """The files of an artifact, with size and sha256."""
        return list(self._get(f"{_job(job)}/artifacts/{_part(artifact)}/files")["data"])

    def fetch_artifact(self, job: str, artifact: str, folder: Path) -> list[Path]:
        """Download an artifact; each file is checked and appears whole."""
        entries = self.artifact_files(job, artifact)
        targets = [inside(folder, entry) for entry in entries]
        for entry, path in zip(entries, targets, strict=True):
            self.fetch_artifact_file(job, artifact, entry, path)
        return targets

    def fetch_artifact_file(
        self, job: str, artifact: str, entry: Mapping[str, Any], path: Path
    ) -> None:
        """Download one listed file of an artifact to ``path``."""
        url = f"{_job(job)}/artifacts/{_part(artifact)}/files/{quote(entry['path'])}"
        fetch(self._connection, url, path, sha256=str(entry["sha256"]))

    def models(self) -> list[Thing]:
        """Base models and the team's tuned ones."""
        return list(self._get("/models")["data"])

    def model(self, name: str) -> Thing:
        """One model by name or id."""
        return self._get(f"/models/{quote(name)}")

    # The cluster ----------------------------------------------------------------------------------

    def nodes(self) -> list[Thing]:
        """Nodes with their devices."""
        return list(self._get("/nodes")["data"])

    def me(self) -> Thing:
        """Whose key this is."""
        return self._get("/me")

    def _get(self, path: str, **params: Any) -> Thing:
        asked = {name: value for name, value in params.items() if value is not None}
        return self._connection.send("GET", path, params=asked)

    def _post(self, path: str, **request: Any) -> Thing:
        return self._connection.send("POST", path, **request)

    def _pages(self, path: str, limit: int, **filters: str | None) -> Iterator[Thing]:
        """Up to ``limit`` things of a list, page by page."""
        cursor = None
        while limit > 0:
            page = self._get(path, limit=min(limit, PAGE), cursor=cursor, **filters)
            yield from page["data"]
            limit -= len(page["data"])
            cursor = page.get("next_cursor")
            if cursor is None or not page["data"]:
                return

    def _later(self, path: str, after: int | str = 0, **filters: Any) -> Iterator[Thing]:
        """All of a list whose pages go on by ``after``."""
        while True:
            page = self._get(path, after=after or None, **filters)
            yield from page["data"]
            after = page.get("next_cursor") or ""
            if not after or not page["data"]:
                return


def _job(job: str) -> str:
    return f"/jobs/{_part(job)}"


def _part(name: str) -> str:
    """One part of a path, whatever was typed."""
    return quote(name, safe="")
