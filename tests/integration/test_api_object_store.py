"""The API over an object store: uploads, ranges, checks before a GPU, and a store that is away."""

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from support.apis import ASK, ROWS, Api, serve
from support.databases import TestDatabase
from support.object_stores import ObjectServer
from support.yards import wait_for

from tuneyard.models.artifacts import StoredFolder
from tuneyard.specs.ids import new_id
from tuneyard.store.folder import manifest_digest, publish_folder
from tuneyard.store.remote import Store

AWAY = {
    "store_url": "s3://bucket/prefix",
    "store_endpoint": "http://127.0.0.1:1",
    "store_access_key": "a",
    "store_secret_key": "s",
}


@pytest.fixture
def api(db: TestDatabase, tmp_path: Path, object_server: ObjectServer) -> Iterator[Api]:
    """An API whose files lie on S3."""
    with serve(db, tmp_path, **object_server.settings(f"api-{tmp_path.name}")) as running:
        yield running


def store_of(api: Api) -> Store:
    store: Store = api.server.config.app.state.yard.store  # type: ignore[union-attr]
    return store


def put(http: httpx.Client, content: bytes = ROWS) -> str:
    answer = http.post("/files", files={"file": ("rows.jsonl", content)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_an_upload_is_checked_read_by_ranges_and_deleted(api: Api) -> None:
    with api.client() as http:
        file = put(http)
        wait_for(
            lambda: http.get(f"/files/{file}").json()["state"] == "processed",
            within_s=20,
            what="the check of the file",
        )
        path = f"/files/{file}/content"
        whole = http.get(path)
        assert (whole.status_code, whole.content) == (200, ROWS)
        assert whole.headers["etag"] == f'"{hashlib.sha256(ROWS).hexdigest()}"'
        part = http.get(path, headers={"Range": "bytes=3-11"})
        assert (part.status_code, part.content) == (206, ROWS[3:12])
        assert part.headers["content-range"] == f"bytes 3-11/{len(ROWS)}"
        last = http.get(path, headers={"Range": "bytes=-5"})
        assert (last.status_code, last.content) == (206, ROWS[-5:])
        beyond = http.get(path, headers={"Range": f"bytes={len(ROWS)}-"})
        assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "bad_range")
        assert http.delete(f"/files/{file}").status_code == 200
        assert http.get(path).status_code == 404
        assert store_of(api).ids("files") == []
        assert list((api.home / "scratch").glob("*/*")) == []  # what the check read is gone


def test_a_refused_upload_leaves_nothing_in_the_store(api: Api) -> None:
    with api.client() as http:
        answer = http.post(
            "/files", files={"file": ("rows.jsonl", ROWS)}, data={"sha256": "ab" * 32}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checksum_mismatch")
    assert store_of(api).ids("files") == []


def test_a_file_of_an_artifact_is_read_by_ranges(api: Api, a_node: Callable[..., UUID]) -> None:
    weights = os.urandom(5 * 1024**2)
    with api.client() as http:
        api.a_base()
        job = http.post("/jobs", json=ASK).json()["id"]
        ref = api.start(job, a_node())
        aside, made, folder_id = api.home / "aside", api.home / "made", new_id()
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "w.bin").write_bytes(weights)
        manifest = publish_folder(aside, made, {})
        store_of(api).put_folder(made, "artifacts", folder_id)
        digest = manifest_digest(manifest)
        api.finish(ref, 0, (StoredFolder(folder_id, "results", manifest, digest, len(weights)),))
        path = f"/jobs/{job}/artifacts/artifact_{folder_id.hex}/files/deep/w.bin"
        assert http.get(path).content == weights
        part = http.get(path, headers={"Range": "bytes=2097150-2097160"})
        assert (part.status_code, part.content) == (206, weights[2097150:2097161])
        store_of(api).remove_folder("artifacts", folder_id)
        gone = http.get(path)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_a_model_on_s3_is_looked_into_before_a_gpu_is_taken(api: Api) -> None:
    header = {
        "model.layers.0.self_attn.q_proj.weight": {
            "dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256],
        }
    }  # fmt: skip
    text = json.dumps(header).encode()
    base = api.a_base()
    aside, made = api.home / "aside", api.home / "made"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))
    (aside / "config.json").write_text('{"num_hidden_layers": 1}')
    (aside / "chat_template.jinja").write_text("{{ messages }}")
    publish_folder(aside, made, {})
    store_of(api).put_folder(made, "models", base)
    with api.client() as http:
        file = put(http)
        asked = {"kind": "finetune", "model": "tiny", "dataset": file, "lora_target": "k_proj"}
        refused = http.post("/jobs", json=asked)
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"]["field"] == "lora_target"
        assert "q_proj" in str(refused.json()["error"])
        asked = {"kind": "finetune", "stage": "grpo", "model": "tiny", "dataset": file}
        refused = http.post("/jobs", json=asked | {"reward_model": "tiny"})
        assert refused.json()["error"]["code"] == "unfit_model", refused.text


def test_a_store_that_is_away_is_503_with_a_time_and_leaves_nothing(
    db: TestDatabase, tmp_path: Path
) -> None:
    with serve(db, tmp_path, **AWAY) as api, api.client() as http:
        began = time.monotonic()
        answers = [http.post("/files", files={"file": ("rows.jsonl", ROWS)}) for _ in range(4)]
        assert time.monotonic() - began < 12
        base, team = api.a_base(), api.team_id()
        file, sha = new_id(), hashlib.sha256(ROWS).hexdigest()
        db.run(
            "INSERT INTO files (id, team_id, name, purpose, bytes, sha256, state)"
            " VALUES (:id, :team, 'rows', 'dataset', :n, :sha, 'processed')",
            id=file, team=team, n=len(ROWS), sha=sha,
        )  # fmt: skip
        answers.append(http.get(f"/files/file_{file.hex}/content"))
        for answer in answers:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
            assert answer.json()["error"]["code"] == "store_unreachable"
        assert http.get("/files").json()["data"][0]["id"] == f"file_{file.hex}"
        assert len(http.get("/files").json()["data"]) == 1
        # The model's headers are out of reach too: what they would tell, the runner will tell.
        document = {"kind": "finetune", "model": f"base_{base.hex}", "dataset": f"file_{file.hex}"}
        job = http.post("/jobs", json=document)
        assert job.status_code == 201, job.text
        assert http.post(f"/jobs/{job.json()['id']}/cancel").status_code == 200
        # What needs no store goes on; bytes that cannot be removed now are the sweep's.
        assert http.delete(f"/files/file_{file.hex}").status_code == 200
