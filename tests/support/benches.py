"""A team at work over HTTP, whose jobs are run by hand: no worker, no runner."""

import json
from typing import Any
from uuid import UUID

import httpx

from support.apis import Api
from tuneyard.models.artifacts import StoredFolder
from tuneyard.specs.ids import new_id, show_id
from tuneyard.store.folder import manifest_digest

ADAPTER, MODEL = "adapter", "model"


def a_folder(kind: str) -> StoredFolder:
    """What a worker records of a result; its files are another matter."""
    folder_id = new_id()
    files = [{"path": "x.safetensors", "size": 1, "sha256": folder_id.hex * 2}]
    manifest = {"files": files}
    return StoredFolder(folder_id, kind, manifest, manifest_digest(manifest), 1)


class Bench:
    """A team at work: jobs are submitted by HTTP and run by hand."""

    def __init__(self, api: Api, http: httpx.Client, node: UUID) -> None:
        self.api, self.http, self.node = api, http, node
        self.base = api.a_base("tiny")
        self.file = self.a_file()

    def a_file(self, form: str = "alpaca") -> str:
        """A data set whose check is over."""
        file, team = new_id(), self.http.get("/me").json()["team"]
        self.api.db.run(
            "INSERT INTO files (id, team_id, name, purpose, bytes, sha256, state, report)"
            " VALUES (:id, :team, 'rows.jsonl', 'dataset', 1, :sha256, 'processed', :report)",
            id=file,
            team=self.api.team_id(team),
            sha256=file.hex * 2,
            report=json.dumps({"rows": 9, "rows_kind": form, "kinds": {form: {"line": 1}}}),
        )
        return show_id("file", file)

    def submit(self, **document: Any) -> dict[str, Any]:
        """A job that is taken."""
        answer = self.http.post("/jobs", json=document)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def refused(self, **document: Any) -> dict[str, Any]:
        """A job that is not."""
        answer = self.http.post("/jobs", json=document)
        assert answer.status_code in (404, 422), answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    def tune(self, name: str = "tuny", *, model: Any = "tiny", **more: Any) -> str:
        """A submitted fine-tune."""
        asked = {"kind": "finetune", "name": name, "model": model, "dataset": self.file}
        job = self.submit(**asked | more)
        tokens = job["inputs"]["tokens"]
        waits = tokens.startswith("job_")
        if waits and self.http.get(f"/jobs/{tokens}").json()["state"] == "queued":
            self.finish(tokens, "tokens")
        return str(job["id"])

    def finish(self, job: str, kind: str, *, code: int = 0) -> str:
        """Run a job to its end; the id of what it brought forth."""
        folder = a_folder(kind)
        ref = self.api.start(job, self.node)
        self.api.finish(ref, code, () if code else (folder,))
        return show_id("artifact", folder.id)

    def tuned(self, name: str = "tuny", **more: Any) -> tuple[str, str]:
        """A finished fine-tune and its adapter."""
        job = self.tune(name, **more)
        return job, self.finish(job, ADAPTER)

    def merged(self, adapter: Any = "tuny", name: str = "whole", **more: Any) -> tuple[str, str]:
        """A finished merge and its model."""
        job = str(self.submit(kind="merge", adapter=adapter, name=name, **more)["id"])
        return job, self.finish(job, MODEL)

    def model(self, name: str) -> dict[str, Any]:
        """A model as it is shown."""
        found: dict[str, Any] = self.http.get(f"/models/{name}").json()
        return found
