"""What a cluster holds, over HTTP: artifacts and their files, models, nodes."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from support.apis import ASK, Api

from tuneyard.models.artifacts import StoredFolder
from tuneyard.models.attempts import AttemptRef
from tuneyard.specs.ids import new_id, show_id
from tuneyard.store.disk import DiskStore
from tuneyard.store.folder import manifest_digest, publish_folder

ADAPTER = bytes(range(256)) * 40


def a_stored_folder(api: Api, kind: str, **more: Any) -> StoredFolder:
    """A folder of two files in the store, and what is recorded of it."""
    folder_id = new_id()
    aside, made = api.home / f"aside-{folder_id.hex}", api.home / folder_id.hex
    (aside / "deep").mkdir(parents=True)
    (aside / "adapter_model.safetensors").write_bytes(ADAPTER)
    (aside / "deep" / "a note.txt").write_text("hello")
    manifest = publish_folder(aside, made, {"eval_loss": None})
    DiskStore(api.home / "store").put_folder(made, "artifacts", folder_id)
    return StoredFolder(folder_id, kind, manifest, manifest_digest(manifest), len(ADAPTER), **more)


class Tuned:
    """A job that is running under a client of its team, to be given artifacts."""

    def __init__(self, api: Api, http: httpx.Client, node: UUID) -> None:
        self.api, self.http = api, http
        self.job: str = http.post("/jobs", json=ASK | {"name": "tone"}).json()["id"]
        self.ref: AttemptRef = api.start(self.job, node)
        self.path = f"/jobs/{self.job}/artifacts"


@pytest.fixture
def tuned(api: Api, a_node: Callable[..., UUID]) -> Iterator[Tuned]:
    api.a_base()
    with api.client() as http:
        yield Tuned(api, http, a_node(gpus=0))


def test_a_result_is_listed_with_its_files_and_read_with_checksums(tuned: Tuned) -> None:
    folder = a_stored_folder(tuned.api, "adapter")
    tuned.api.finish(tuned.ref, folders=(folder,))
    (artifact,) = tuned.http.get(tuned.path).json()["data"]
    assert (artifact["kind"], artifact["attempt"], artifact["digest"]) == (
        "adapter",
        1,
        folder.digest,
    )
    path = f"{tuned.path}/{artifact['id']}/files"
    files = {each["path"]: each for each in tuned.http.get(path).json()["data"]}
    assert set(files) == {"adapter_model.safetensors", "deep/a note.txt"}
    answer = tuned.http.get(f"{path}/adapter_model.safetensors")
    assert answer.content == ADAPTER
    sha256 = files["adapter_model.safetensors"]["sha256"]
    assert answer.headers["etag"] == f'"{sha256}"'
    assert answer.headers["x-checksum-sha256"] == sha256
    assert answer.headers["content-length"] == str(len(ADAPTER))
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert tuned.http.get(f"{path}/deep/a%20note.txt").text == "hello"
    assert tuned.http.get(f"/jobs/{tuned.job}").json()["model"] == "tone"


def test_a_download_that_broke_off_goes_on_by_range(tuned: Tuned) -> None:
    folder = a_stored_folder(tuned.api, "adapter")
    tuned.api.finish(tuned.ref, folders=(folder,))
    path = f"{tuned.path}/{show_id('artifact', folder.id)}/files/adapter_model.safetensors"
    rest = tuned.http.get(path, headers={"Range": "bytes=10000-"})
    assert (rest.status_code, rest.content) == (206, ADAPTER[10000:])
    end = tuned.http.get(path, headers={"Range": "bytes=-5"})
    assert end.content == ADAPTER[-5:]
    for odd in ("bytes=99999-", "bytes=5-2", "bytes=-0"):
        answer = tuned.http.get(path, headers={"Range": odd})
        assert (answer.status_code, answer.json()["error"]["code"]) == (416, "bad_range")
    for ignored in ("bytes=", "lines=1-2", "bytes=0-1,4-5", "bytes=a-b"):
        assert tuned.http.get(path, headers={"Range": ignored}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "../manifest.json",
        "%2e%2e/x",
        "manifest.json",
        "/etc/passwd",
        "deep",
        "",
        "a%5cb",
    ],
)
def test_only_what_the_manifest_lists_is_read(tuned: Tuned, name: str) -> None:
    folder = a_stored_folder(tuned.api, "adapter")
    tuned.api.finish(tuned.ref, folders=(folder,))
    answer = tuned.http.get(f"{tuned.path}/{show_id('artifact', folder.id)}/files/{name}")
    assert answer.status_code == 404


def test_pruned_checkpoints_are_not_offered(tuned: Tuned) -> None:
    for step in (1, 2, 3):
        tuned.api.checkpoint(tuned.ref, a_stored_folder(tuned.api, "checkpoint", step=step))
    shown = tuned.http.get(tuned.path).json()["data"]
    assert [each["step"] for each in shown] == [3, 2]
    gone = tuned.api.db.rows("SELECT id FROM artifacts WHERE step = 1")[0].id
    path = f"{tuned.path}/{show_id('artifact', gone)}/files"
    assert tuned.http.get(path).status_code == 404


def test_another_teams_artifact_is_answered_like_one_that_never_was(tuned: Tuned) -> None:
    folder = a_stored_folder(tuned.api, "adapter")
    tuned.api.finish(tuned.ref, folders=(folder,))
    real, never = (show_id("artifact", each) for each in (folder.id, new_id()))
    with tuned.api.client("other") as other:
        mine = other.post("/jobs", json=ASK).json()["id"]
        for suffix in ("", "/adapter_model.safetensors"):
            answers = [
                other.get(f"/jobs/{mine}/artifacts/{artifact}/files{suffix}")
                for artifact in (real, never, "artifact_x")
            ]
            assert {a.status_code for a in answers} == {404}
            assert len({a.content for a in answers}) == 1
        assert other.get(f"{tuned.path}/{real}/files").status_code == 404


def test_models_are_all_bases_and_the_teams_tuned_ones(tuned: Tuned) -> None:
    folder = a_stored_folder(tuned.api, "adapter")
    tuned.api.finish(tuned.ref, folders=(folder,))
    found = {each["name"]: each for each in tuned.http.get("/models").json()["data"]}
    assert {name: each["kind"] for name, each in found.items()} == {"tiny": "base", "tone": "tuned"}
    tone = found["tone"]
    assert (tone["base_model"], tone["job"]) == ("tiny", tuned.job)
    assert (tone["artifact"], tone["digest"]) == (show_id("artifact", folder.id), folder.digest)
    for name in ("tone", tone["id"]):
        assert tuned.http.get(f"/models/{name}").json() == tone
    assert tuned.http.get(f"/models/{found['tiny']['id']}").json() == found["tiny"]
    with tuned.api.client("other") as other:
        assert [each["name"] for each in other.get("/models").json()["data"]] == ["tiny"]
        answers = [other.get(f"/models/{name}") for name in ("tone", tone["id"], "never")]
        assert {a.status_code for a in answers} == {404}
        assert len({a.content for a in answers}) == 1


def test_model_names_with_slashes_and_colons_are_found(api: Api) -> None:
    api.a_base("ft:LLM-Research/Meta-Llama:x")
    with api.client() as http:
        answer = http.get("/models/ft:LLM-Research/Meta-Llama:x")
    assert answer.status_code == 200, answer.text


def test_nodes_show_what_is_free_and_who_holds_it_only_to_its_team(
    api: Api, a_node: Callable[..., UUID]
) -> None:
    api.a_base()
    node = a_node("n1", gpus=2, cpu_slots=2)
    with api.client() as http, api.client("other") as other:
        job = http.post("/jobs", json=ASK).json()["id"]
        api.start(job, node)
        (mine,), (theirs,) = (c.get("/nodes").json()["data"] for c in (http, other))
    assert (mine["name"], mine["state"], mine["free_slots"], mine["busy_slots"]) == (
        "n1",
        "up",
        3,
        1,
    )
    assert [each["kind"] for each in mine["devices"]] == ["gpu", "gpu", "cpu"]
    assert [slot["job"] for slot in mine["devices"][2]["slots"]] == [job, None]
    assert [slot["job"] for slot in theirs["devices"][2]["slots"]] == [None, None]
    assert [slot["busy"] for slot in theirs["devices"][2]["slots"]] == [True, False]


def test_a_node_that_is_not_heard_of_is_silent(api: Api, a_node: Callable[..., UUID]) -> None:
    a_node("n1")
    api.db.run("UPDATE nodes SET seen_at = clock_timestamp() - interval '1 hour'")
    with api.client() as http:
        assert http.get("/nodes").json()["data"][0]["state"] == "silent"
