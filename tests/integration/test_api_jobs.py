"""Jobs over HTTP: submitting once, listing, showing, cancelling, retrying."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from support.apis import ASK, ROWS, Api, serve, serve_again

from tuneyard.specs.ids import new_id, show_id


def count(api: Api, table: str = "jobs") -> int:
    return int(api.db.rows(f"SELECT count(*) FROM {table}")[0][0])


def test_a_submitted_job_is_answered_whole_and_is_on_disk(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        answer = http.post("/jobs", json=ASK | {"name": "ask"})
        assert answer.status_code == 201, answer.text
        job = answer.json()
        assert http.get(answer.headers["location"].removeprefix("/api/v1")).json() == job
    assert (job["kind"], job["name"], job["state"]) == ("inference", "ask", "queued")
    assert (job["team"], job["attempts"], job["error"]) == ("default", [], None)
    assert job["inputs"]["model"].startswith("base_")
    assert job["allowed_actions"] == ["cancel"]
    assert job["created_at"].endswith("Z")
    assert count(api) == 1


def test_an_admin_may_let_trust_remote_code_pass_without_effect(api: Api) -> None:
    api.a_base()
    asked = ASK | {"trust_remote_code": True}
    with api.client() as http:
        for document in (asked, {"pipeline": [asked]}):
            refused = http.post("/jobs", json=document)
            assert refused.status_code == 403, refused.text
            assert refused.json()["error"]["code"] == "remote_code_forbidden"
    with serve(api.db, api.home, trust_remote_code="ignored") as lenient, lenient.client() as http:
        for document in (asked, {"pipeline": [asked]}):
            answer = http.post("/jobs", json=document)
            assert answer.status_code == 201, answer.text
        job = http.get("/jobs").json()["data"][0]
        (note,) = http.get(f"/jobs/{job['id']}").json()["notes"]
        assert note["field"] == "trust_remote_code"
        assert note["message"].endswith("is never run")


def test_a_key_used_again_answers_the_same_job(api: Api) -> None:
    api.a_base()
    headers = {"Idempotency-Key": "mine"}
    with api.client() as http:
        first = http.post("/jobs", json=ASK, headers=headers)
        # The same body, spelt otherwise; and its base model is gone by now.
        api.db.run("DELETE FROM base_models")
        again = http.post(
            "/jobs",
            content=b'{"prompts":["Who are you?"], "model":"tiny","kind":"inference"}',
            headers=headers | {"Content-Type": "application/json"},
        )
    assert again.status_code == 201
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert count(api) == 1


def test_a_key_used_with_another_body_is_a_conflict(api: Api) -> None:
    api.a_base()
    headers = {"Idempotency-Key": "mine"}
    with api.client() as http:
        http.post("/jobs", json=ASK, headers=headers)
        answer = http.post("/jobs", json=ASK | {"name": "other"}, headers=headers)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "idempotency_conflict"
    assert count(api) == 1


def test_a_key_is_forgotten_when_its_day_is_over(api: Api) -> None:
    api.a_base()
    headers = {"Idempotency-Key": "mine"}
    with api.client() as http:
        first = http.post("/jobs", json=ASK, headers=headers).json()
        api.db.run("UPDATE idempotency_keys SET expires = clock_timestamp()")
        second = http.post("/jobs", json=ASK, headers=headers).json()
    assert first["id"] != second["id"]


def test_one_key_sent_twice_at_once_makes_one_job(api: Api) -> None:
    api.a_base()
    headers = {"Idempotency-Key": "mine"}
    with api.client() as http, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.post("/jobs", json=ASK, headers=headers), range(16)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert count(api) == 1


def test_teams_may_use_the_same_key_each_for_itself(api: Api) -> None:
    api.a_base()
    headers = {"Idempotency-Key": "mine"}
    with api.client("one") as one, api.client("two") as two:
        ids = {http.post("/jobs", json=ASK, headers=headers).json()["id"] for http in (one, two)}
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["", "k" * 256, "k" * 10_000, "tab\there", "ümlaut"])
def test_an_odd_key_is_refused(api: Api, key: str) -> None:
    with api.client() as http:
        answer = http.post("/jobs", json=ASK, headers={"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "Idempotency-Key"
    assert count(api) == 0


def test_all_problems_of_a_spec_are_named_at_once(api: Api) -> None:
    with api.client() as http:
        body = {"kind": "finetune", "model": "tiny", "dataset": "x", "lora_rnak": 8, "epochs": 1}
        answer = http.post("/jobs", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 422
    assert error["code"] == "unknown_field"
    assert {each["field"] for each in error["details"]} == {"lora_rnak", "epochs"}
    assert "lora_rank" in error["details"][0]["hint"]
    assert count(api) == 0


def test_a_missing_model_is_refused_with_those_there_are(api: Api) -> None:
    api.a_base("tiny")
    with api.client() as http:
        answer = http.post("/jobs", json=ASK | {"model": "tinny"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (404, "model_not_found", "model")
    assert "tiny" in error["hint"]
    assert count(api) == 0


def test_a_model_that_is_still_tuned_is_waited_for_by_its_name_or_its_job(api: Api) -> None:
    api.a_base("tiny")
    tune = {"kind": "finetune", "model": "tiny", "stage": "sft", "finetuning_type": "lora"}
    with api.client() as http:
        file = http.post("/files", files={"file": ("rows.jsonl", ROWS)}).json()["id"]
        made = http.post("/jobs", json=tune | {"dataset": file, "name": "my tuny"}).json()["id"]
        for name in ("my-tuny", made):
            waiting = http.post("/jobs", json=ASK | {"model": name})
            assert (waiting.status_code, waiting.json()["state"]) == (201, "blocked")
    waits_for = api.db.rows(
        "SELECT DISTINCT parent FROM job_edges JOIN jobs ON id = child AND kind = 'inference'"
    )
    assert [show_id("job", row.parent) for row in waits_for] == [made]


def test_pages_show_every_job_once_newest_first(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        made = [http.post("/jobs", json=ASK).json()["id"] for _ in range(7)]
        seen, cursor = [], None
        while True:
            params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
            page = http.get("/jobs", params=params).json()
            seen += [job["id"] for job in page["data"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
            http.post("/jobs", json=ASK)  # what comes meanwhile moves nothing
    assert seen == made[::-1]


def test_lists_are_filtered_by_state_kind_and_name(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        one = http.post("/jobs", json=ASK | {"name": "one"}).json()["id"]
        two = http.post("/jobs", json=ASK | {"name": "two"}).json()["id"]
        http.post(f"/jobs/{one}/cancel")

        def found(**params: object) -> list[str]:
            return [job["id"] for job in http.get("/jobs", params=params).json()["data"]]

        assert found(state="queued") == [two]
        assert found(state="queued,cancelled") == [two, one]
        assert found(state=["queued", "cancelled"]) == [two, one]
        assert found(name="one") == [one]
        assert found(kind="finetune") == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "out_of_range"),
        ("limit=-1", "out_of_range"),
        ("limit=1000000000", "out_of_range"),
        ("limit=abc", "wrong_type"),
        ("cursor=abc", "bad_cursor"),
        ("cursor=", "bad_cursor"),
        ("cursor=" + "A" * 32, "bad_cursor"),
        ("state=runing", "bad_choice"),
        ("kind=zz", "bad_choice"),
        ("stat=running", "unknown_field"),
        ("name=%00", "bad_character"),
    ],
)
def test_odd_parameters_of_a_list_are_refused(api: Api, query: str, code: str) -> None:
    with api.client() as http:
        answer = http.get(f"/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)


def test_a_cursor_of_another_team_or_other_filters_is_refused(api: Api) -> None:
    api.a_base()
    with api.client("one") as one, api.client("two") as two:
        for _ in range(2):
            one.post("/jobs", json=ASK)
        cursor = one.get("/jobs?limit=1").json()["next_cursor"]
        for http, query in ((two, ""), (one, "&kind=finetune")):
            answer = http.get(f"/jobs?limit=1&cursor={cursor}{query}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_cursor")


PATHS = ["", "/events", "/metrics", "/logs", "/artifacts", "/cancel", "/retry"]


@pytest.mark.parametrize("path", PATHS)
def test_another_teams_job_is_answered_like_one_that_never_was(api: Api, path: str) -> None:
    api.a_base()
    method = "POST" if path in ("/cancel", "/retry") else "GET"
    with api.client("one") as one, api.client("two") as two:
        theirs = one.post("/jobs", json=ASK).json()["id"]
        answers = [
            two.request(method, f"/jobs/{job}{path}")
            for job in (theirs, show_id("job", new_id()), "job_xyz", theirs.upper(), "' OR 1=1--")
        ]
        assert one.get(f"/jobs/{theirs}").json()["state"] == "queued"
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers}) == 1


def test_another_teams_things_cannot_be_named_in_a_body(api: Api) -> None:
    api.a_base()
    with api.client("one") as one, api.client("two") as two:
        job = one.post("/jobs", json=ASK).json()["id"]
        file = one.post("/files", files={"file": ("p.txt", b"hi\n")}, data={"purpose": "prompts"})
        never = show_id("job", new_id())
        answers = [two.post("/jobs", json=ASK | {"model": {"from": j}}) for j in (job, never)]
        prompts = file.json()["id"]
        foreign = two.post("/jobs", json=ASK | {"prompts": prompts})
    texts = {a.text.replace(job, "ID").replace(never, "ID") for a in answers}
    assert ({a.status_code for a in answers}, len(texts)) == ({404}, 1)
    assert foreign.status_code == 404


def test_a_queued_job_is_cancelled_at_once_and_asking_twice_is_asking_once(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
        answers = [http.post(f"/jobs/{job}/cancel") for _ in range(2)]
    assert [(a.status_code, a.json()["state"]) for a in answers] == [(200, "cancelled")] * 2
    assert answers[0].json()["allowed_actions"] == ["retry"]


def test_a_running_job_is_cancelled_through_its_attempt(
    api: Api, a_node: Callable[..., UUID]
) -> None:
    api.a_base()
    node = a_node(gpus=0)
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
        api.start(job, node)
        answers = [http.post(f"/jobs/{job}/cancel").json() for _ in range(2)]
    assert [a["state"] for a in answers] == ["cancelling"] * 2
    assert answers[0]["attempts"][0]["stop_reason"] == "cancel"


def test_a_job_that_ended_is_not_cancelled_but_tried_again(
    api: Api, a_node: Callable[..., UUID]
) -> None:
    api.a_base()
    node = a_node(gpus=0)
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
        assert http.post(f"/jobs/{job}/retry").json()["error"]["code"] == "not_ended"
        api.finish(api.start(job, node), code=64)
        shown = http.get(f"/jobs/{job}").json()
        assert shown["state"] == "failed"
        assert shown["error"]["code"] == "bad_spec"
        refused = http.post(f"/jobs/{job}/cancel")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "already_ended")
        headers = {"Idempotency-Key": "again"}
        body = {"patch": {"max_new_tokens": 7}, "from_scratch": True}
        answers = [http.post(f"/jobs/{job}/retry", json=body, headers=headers) for _ in range(2)]
        again = answers[0].json()
    assert answers[1].json()["id"] == again["id"] != job
    assert (again["retry_of"], again["state"]) == (job, "queued")
    assert again["spec"]["max_new_tokens"] == 7


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"pacth": {}}, "unknown_field"),
        ({"patch": []}, "wrong_type"),
        ({"from_scratch": "yes"}, "wrong_type"),
        ({"patch": {"max_new_tokens": -1}}, "out_of_range"),
        ({"patch": {"max_new_tokns": 1}}, "unknown_field"),
    ],
)
def test_an_odd_retry_is_refused(api: Api, body: dict[str, object], code: str) -> None:
    api.a_base()
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
        http.post(f"/jobs/{job}/cancel")
        answer = http.post(f"/jobs/{job}/retry", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
    assert count(api) == 1


def test_attempts_show_node_devices_and_how_they_ended(
    api: Api, a_node: Callable[..., UUID]
) -> None:
    api.a_base()
    node = a_node("n7", gpus=0)
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
        api.lose(api.start(job, node))
        ref = api.start(job, node)
        api.ship(ref, phase="running", progress={"done": 3, "total": 9, "eta_s": 1.5})
        shown = http.get(f"/jobs/{job}").json()
        assert http.get("/jobs").json()["data"] == [shown]
    first, second = shown["attempts"]
    assert (first["number"], first["outcome"], first["charged"]) == (1, "lost", False)
    assert (second["node"], second["devices"], second["phase"]) == ("n7", ["cpu"], "running")
    assert (second["outcome"], second["ended_at"]) == (None, None)
    assert shown["progress"] == {"done": 3, "total": 9, "unit": "steps", "eta_s": 1.5}


def test_jobs_outlive_the_api(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        job = http.post("/jobs", json=ASK).json()["id"]
    with serve_again(api) as other, other.client() as http:
        assert http.get(f"/jobs/{job}").json()["state"] == "queued"
