"""Tune, merge, ask, learn from rewards: by HTTP through scheduler, worker and real runners."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.apis import serve
from support.clusters import Cluster
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.online import QUESTIONS as QUESTION_ROWS
from support.tiny_models import a_dataset, a_tiny_base
from support.yards import wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.models.artifacts import StoredFolder, publish_base_model
from tuneyard.specs.ids import new_id
from tuneyard.store.disk import DiskStore
from tuneyard.store.folder import manifest_digest, publish_folder

QUESTIONS = ["What does a cat say?", "What does a heron say?", "Who?"]


@pytest.fixture
def http(db: TestDatabase, valkey: RunningValkey, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of an API with a scheduler and a worker behind it, and a tiny base in the store."""
    home = tmp_path / "home"
    home.mkdir()
    with serve(db, home) as api, api.client() as client:
        bring_the_base(db, home, tmp_path)
        cluster = Cluster(db, home, valkey.url, {"runner_python": sys.executable})
        for program in ("scheduler", "worker"):
            cluster.start(program)
        yield client
        cluster.stop()
    assert broken_invariants(db) == {}


def bring_the_base(db: TestDatabase, home: Path, aside: Path) -> None:
    """What a download would leave: a folder in the store, and its row."""
    base_id = new_id()
    a_tiny_base(aside / "made", hidden=48)
    manifest = publish_folder(aside / "made", aside / "base", {"source": "here", "revision": "r1"})
    DiskStore(home / "store").put_folder(aside / "base", "models", base_id)
    folder = StoredFolder(base_id, "base_model", manifest, manifest_digest(manifest), 1)
    with db.worker.begin() as tx:
        publish_base_model(tx, "tiny", folder)


def finish(http: httpx.Client, **document: Any) -> dict[str, Any]:
    """Submit a job and wait for its success."""
    answer = http.post("/jobs", json=document)
    assert answer.status_code == 201, answer.text
    path = f"/jobs/{answer.json()['id']}"
    ended = wait_for(
        lambda: job if (job := http.get(path).json())["finished_at"] else None,
        within_s=120,
        what=f"the end of {document['kind']}",
    )
    assert ended["state"] == "succeeded", ended
    found: dict[str, Any] = ended
    return found


def answers(http: httpx.Client, model: str) -> str:
    """Greedy answers, in full precision."""
    job = finish(
        http, kind="inference", model=model, prompts=QUESTIONS, temperature=0, max_new_tokens=24
    )
    path = f"/jobs/{job['id']}/artifacts"
    (artifact,) = http.get(path).json()["data"]
    return http.get(f"{path}/{artifact['id']}/files/results.jsonl").text


def test_a_tuned_model_is_merged_and_answers_as_before(http: httpx.Client, tmp_path: Path) -> None:
    with a_dataset(tmp_path / "rows.jsonl").open("rb") as file:
        rows = http.post("/files", files={"file": file}).json()["id"]
    tune = http.post(
        "/jobs",
        json={
            "kind": "finetune", "name": "tuny", "model": "tiny", "dataset": rows, "max_steps": 6,
            "learning_rate": 0.02, "default_system": "Be brief.", "device": "cpu",
        },
    ).json()["id"]  # fmt: skip
    merge = finish(http, kind="merge", adapter={"from": tune}, name="whole", dtype="float32")
    path = f"/jobs/{merge['id']}/artifacts"
    (artifact,) = http.get(path).json()["data"]
    files = {each["path"] for each in http.get(f"{path}/{artifact['id']}/files").json()["data"]}
    assert {"model.safetensors", "config.json", "adapter/adapter_config.json"} <= files
    assert merge["progress"]["done"] == merge["progress"]["total"] > 0
    tuned, whole, base = (answers(http, name) for name in ("tuny", "whole", "tiny"))
    assert tuned == whole != base
    asked = {"kind": "finetune", "model": "whole", "dataset": rows, "lora_target": "q_prj"}
    refused = http.post("/jobs", json=asked).json()["error"]  # by the merged model's own headers
    assert refused["code"] == "no_module_matches"
    assert refused["hint"].startswith("did you mean q_proj")
    model = http.get("/models/whole").json()
    said = http.get(f"{path}/{artifact['id']}/files/tuneyard.json").json()
    assert said["job"] == merge["id"]
    assert said["adapter"]["id"] == model["adapter"]
    assert (said["base"]["id"], said["base"]["revision"]) == ("tiny", "r1")
    assert model["artifact"] == artifact["id"]


def test_a_reward_model_is_tuned_and_another_model_learns_from_it(
    http: httpx.Client, tmp_path: Path
) -> None:
    liked = [{**row, "chosen": "abc", "rejected": "xyz"} for row in QUESTION_ROWS]
    files = {}
    for name, rows in (("liked", liked), ("questions", QUESTION_ROWS)):
        with a_dataset(tmp_path / f"{name}.jsonl", rows).open("rb") as file:
            files[name] = http.post("/files", files={"file": file}).json()["id"]
    tuned = {"kind": "finetune", "model": "tiny", "device": "cpu"}
    judge = tuned | {"name": "judge", "dataset": files["liked"], "stage": "rm", "max_steps": 2}
    learner = tuned | {
        "name": "learner",
        "dataset": files["questions"],
        "stage": "grpo",
        "reward_model": {"from": "judge"},
        "max_completion_length": 4,
        "max_steps": 2,
    }
    steps = http.post("/jobs", json={"pipeline": [judge, learner]}).json()["jobs"]
    path = f"/jobs/{steps[-1]['id']}"
    ended = wait_for(
        lambda: job if (job := http.get(path).json())["finished_at"] else None,
        within_s=120,
        what="the end of the learner",
    )
    assert ended["state"] == "succeeded", ended
    assert set(ended["inputs"]) == {"dataset", "model", "reward_model", "reward_base", "tokens"}
    metrics = http.get(f"{path}/metrics").json()["data"]
    names = {name for each in metrics for name in each["values"]}
    assert {"reward", "reward_std", "rewards/reward_model/mean", "loss", "lr"} <= names


def test_whole_weights_and_one_that_goes_on_are_asked_by_their_names(
    http: httpx.Client, tmp_path: Path
) -> None:
    with a_dataset(tmp_path / "rows.jsonl").open("rb") as file:
        rows = http.post("/files", files={"file": file}).json()["id"]
    tune = {
        "kind": "finetune", "model": "tiny", "dataset": rows, "learning_rate": 0.02,
        "device": "cpu", "finetuning_type": "freeze", "freeze_trainable_layers": 1,
    }  # fmt: skip
    whole = finish(http, **tune, name="whole", max_steps=2)
    path = f"/jobs/{whole['id']}/artifacts"
    (artifact,) = http.get(path).json()["data"]
    assert artifact["kind"] == "model"
    files = {each["path"] for each in http.get(f"{path}/{artifact['id']}/files").json()["data"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tuneyard.json"} <= files
    assert len(answers(http, "whole").splitlines()) == len(QUESTIONS)
    refused = http.post("/jobs", json=tune | {"freeze_trainable_modules": "mpl"}).json()["error"]
    assert refused["hint"].startswith("did you mean mlp")  # by the headers of the base
    lora = tune | {"finetuning_type": "lora"}
    first = finish(http, **lora, name="first", max_steps=1)
    on = finish(http, **lora, name="second", adapter="first", create_new_adapter=True, max_steps=1)
    (kept,) = http.get(f"/jobs/{on['id']}/artifacts").json()["data"]
    path = f"/jobs/{on['id']}/artifacts/{kept['id']}/files"
    (below,) = http.get(f"/jobs/{first['id']}/artifacts").json()["data"]
    assert http.get(f"{path}/tuneyard.json").json()["adapters"] == [below["id"]]
    assert http.get(f"{path}/adapter_config.json").json()["r"] == 16  # both of them
