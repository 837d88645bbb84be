"""Merges at submission: what an adapter, a base and a merged model are to each kind of job."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from support.apis import Api
from support.benches import ADAPTER, MODEL, Bench

from tuneyard.models.artifacts import forget_work
from tuneyard.models.migration import downgrade, upgrade
from tuneyard.specs.ids import parse_id, show_id


@pytest.fixture
def bench(api: Api, a_node: Callable[..., UUID]) -> Iterator[Bench]:
    with api.client() as http:
        yield Bench(api, http, a_node(gpus=0))


def base_id(bench: Bench) -> str:
    return show_id("base_model", bench.base)


def test_an_adapter_is_named_by_job_model_or_name_and_its_own_base_is_found(bench: Bench) -> None:
    job, adapter = bench.tuned("tuny", output_dir="saves/tiny/lora/sft/")
    model = bench.model("tuny")["id"]
    names: list[Any] = [job, {"from": job}, {"from": f"{job}.adapter"}, model, "tuny"]
    for named in [*names, "saves/tiny/lora/sft"]:
        merge = bench.submit(kind="merge", adapter=named)
        assert (merge["state"], merge["device"]) == ("queued", "cpu")
        assert merge["inputs"] == {"adapter": adapter, "model": base_id(bench)}


def test_a_merge_of_a_fine_tune_that_still_runs_waits_for_it(bench: Bench) -> None:
    job = bench.tune("tuny")
    for named in ({"from": job}, job, "tuny"):
        merge = bench.submit(kind="merge", adapter=named, model="tiny")
        assert merge["state"] == "blocked"
        assert merge["wait_reason"] == f"waits for {job} (adapter)"
    adapter = bench.finish(job, ADAPTER)
    shown = bench.http.get(f"/jobs/{merge['id']}").json()
    assert shown["state"] == "queued"
    assert shown["inputs"] == {"adapter": adapter, "model": base_id(bench)}


def test_a_merge_of_a_failed_fine_tune_is_refused(bench: Bench) -> None:
    job = bench.tune("tuny")
    bench.finish(job, ADAPTER, code=64)
    error = bench.refused(kind="merge", adapter=job)
    assert (error["code"], error["field"]) == ("dependency_failed", "adapter")
    assert bench.refused(kind="merge", adapter="tuny")["code"] == "model_not_found"


def test_a_merge_that_waits_fails_with_its_fine_tune(bench: Bench) -> None:
    job = bench.tune("tuny")
    merge = bench.submit(kind="merge", adapter=job)["id"]
    bench.finish(job, ADAPTER, code=64)
    shown = bench.http.get(f"/jobs/{merge}").json()
    assert (shown["state"], shown["error"]["code"]) == ("failed", "dependency_failed")


def test_another_base_is_refused_at_submission_unless_forced(bench: Bench) -> None:
    bench.tuned("tuny")
    other = show_id("base_model", bench.api.a_base("other"))
    error = bench.refused(kind="merge", adapter="tuny", model="other")
    assert (error["code"], error["field"]) == ("base_mismatch", "model")
    assert "force: true" in error["hint"]
    forced = bench.submit(kind="merge", adapter="tuny", model="other", force=True)
    assert forced["inputs"]["model"] == other


def test_a_newer_revision_of_the_base_is_another_base(bench: Bench) -> None:
    bench.tuned("tuny")
    bench.api.a_base("tiny")
    error = bench.refused(kind="merge", adapter="tuny", model="tiny")
    assert error["code"] == "base_mismatch"
    assert error["message"].count("tiny 1 (") == 2
    assert bench.submit(kind="merge", adapter="tuny")["inputs"]["model"] == base_id(bench)
    again = bench.submit(kind="merge", adapter="tuny", model=base_id(bench))
    assert again["inputs"]["model"] == base_id(bench)


def test_another_base_is_refused_while_the_adapter_is_still_being_tuned(bench: Bench) -> None:
    bench.api.a_base("other")
    error = bench.refused(kind="merge", adapter=bench.tune("tuny"), model="other")
    assert error["code"] == "base_mismatch"


def test_a_base_is_held_against_the_adapter_that_was_named_whatever_bears_its_name(
    bench: Bench,
) -> None:
    bench.api.a_base("other")
    older, newer = bench.tune("tuny"), bench.tune("tuny", model="other")
    merge = bench.submit(kind="merge", adapter="tuny", model="other")
    assert merge["inputs"]["adapter"] == newer
    bench.finish(older, ADAPTER)
    adapter = bench.finish(newer, ADAPTER)
    shown = bench.http.get(f"/jobs/{merge['id']}").json()
    assert (shown["state"], shown["inputs"]["adapter"]) == ("queued", adapter)


def test_whoever_asks_for_work_that_is_being_cancelled_gets_its_own(bench: Bench) -> None:
    asked = {"kind": "finetune", "model": "tiny", "dataset": bench.file}
    first = bench.submit(name="first", **asked)
    ref = bench.api.start(first["inputs"]["tokens"], bench.node)
    bench.http.post(f"/jobs/{first['id']}/cancel").raise_for_status()
    shown = bench.http.get(f"/jobs/{first['inputs']['tokens']}").json()
    assert shown["state"] == "cancelling"
    second = bench.submit(name="second", **asked)
    assert second["inputs"]["tokens"] != first["inputs"]["tokens"]
    bench.api.finish(ref, 75, ())
    assert bench.http.get(f"/jobs/{first['inputs']['tokens']}").json()["state"] == "cancelled"
    assert bench.http.get(f"/jobs/{second['id']}").json()["state"] == "blocked"


def test_work_whose_result_is_gone_is_done_anew_for_the_next(bench: Bench) -> None:
    asked = {"kind": "finetune", "model": "tiny", "dataset": bench.file}
    first = bench.submit(name="first", **asked)
    tokens = bench.finish(first["inputs"]["tokens"], "tokens")
    assert bench.submit(name="second", **asked)["inputs"]["tokens"] == tokens
    with bench.api.db.worker.begin() as tx:
        forget_work(tx, parse_id("artifact", tokens))
    third = bench.submit(name="third", **asked)
    assert third["inputs"]["tokens"].startswith("job_")


def test_what_is_no_adapter_is_refused_with_what_to_do(bench: Bench) -> None:
    bench.tuned("tuny")
    merge, _ = bench.merged("tuny", "whole")
    asked = bench.submit(kind="inference", model="tiny", prompts=["Who?"])["id"]
    refusals = {
        "whole": ("not_an_adapter", "This is a whole model, no adapter."),
        merge: ("not_an_adapter", "This is a whole model, no adapter."),
        asked: ("wrong_output", "The results of an inference job cannot be an adapter."),
        "tiny": ("not_an_adapter", "'tiny' is a base model, no adapter."),
        "nothing": ("model_not_found", "There is no adapter 'nothing'."),
    }
    for named, said in refusals.items():
        error = bench.refused(kind="merge", adapter=named)
        assert (error["code"], error["message"]) == said
        assert error["field"] == "adapter"
        assert error["hint"]


def test_tuning_over_an_adapter_is_refused_until_it_is_merged(bench: Bench) -> None:
    job, _ = bench.tuned("tuny")
    asked = {"kind": "finetune", "dataset": bench.file}
    for named in ("tuny", job, {"from": job}):
        error = bench.refused(**asked, model=named)
        assert error["code"] in ("not_a_whole_model", "wrong_output")
        assert "tuneyard merge" in error["hint"]
        assert "by adapter: its name" in error["hint"]
    assert bench.refused(kind="merge", adapter="no")["hint"].startswith("known here: tuny;")
    # An inference asks it all the same.
    assert bench.submit(kind="inference", model="tuny", prompts=["Who?"])["state"] == "queued"


def test_a_merged_model_is_asked_and_tuned_like_any_model(bench: Bench) -> None:
    bench.tuned("tuny")
    merge, model = bench.merged("tuny", "whole")
    for named in ("whole", merge, {"from": merge}, bench.model("whole")["id"]):
        job = bench.submit(kind="inference", model=named, prompts=["Who?"])
        assert job["inputs"] == {"model": model}
    _, adapter = bench.tuned("second", model="whole")
    asked = bench.submit(kind="inference", model="second", prompts=["Who?"])
    assert asked["inputs"] == {"model": model, "adapter": adapter}
    (row,) = bench.api.db.rows("SELECT * FROM models WHERE name = 'second'")
    (parent,) = bench.api.db.rows("SELECT * FROM models WHERE name = 'whole'")
    assert (row.parent_model_id, row.base_model_id) == (parent.id, None)
    _, deeper = bench.merged("second", "deeper")
    assert bench.submit(kind="merge", adapter="second")["inputs"]["model"] == model
    assert bench.model("deeper")["base_model"] == "whole"
    assert bench.model("deeper")["artifact"] == deeper


def test_a_job_waits_for_a_merge_by_its_id_or_its_models_name(bench: Bench) -> None:
    bench.tuned("tuny")
    merge = bench.submit(kind="merge", adapter="tuny", model_name="mine")["id"]
    waiting = [
        bench.submit(kind="inference", model=named, prompts=["Who?"])
        for named in ({"from": merge}, "mine")
    ]
    assert [each["wait_reason"] for each in waiting] == [f"waits for {merge} (model)"] * 2
    model = bench.finish(merge, MODEL)
    for each in waiting:
        assert bench.http.get(f"/jobs/{each['id']}").json()["inputs"] == {"model": model}


def test_the_catalogue_shows_what_a_merged_model_was_made_of(bench: Bench) -> None:
    _, adapter = bench.tuned("tuny")
    merge, model = bench.merged("tuny", "job's name", model_name="org/mine")
    found = bench.model("org/mine")
    assert (found["kind"], found["base_model"], found["job"]) == ("merged", "tiny", merge)
    assert (found["artifact"], found["adapter"]) == (model, adapter)
    assert bench.http.get(f"/jobs/{merge}").json()["model"] == "org/mine"
    kinds = {each["name"]: each["kind"] for each in bench.http.get("/models").json()["data"]}
    assert kinds == {"tiny": "base", "tuny": "tuned", "org/mine": "merged"}
    (artifact,) = bench.http.get(f"/jobs/{merge}/artifacts").json()["data"]
    assert (artifact["kind"], artifact["id"]) == ("model", model)


def test_rows_of_the_release_before_are_adapters_and_merged_ones_go_with_their_schema(
    bench: Bench,
) -> None:
    bench.tuned("tuny")
    bench.merged("tuny", "whole")
    bench.tuned("second", model="whole")
    with bench.api.db.owner.begin() as tx:
        downgrade(tx, "0001")
    assert [r.name for r in bench.api.db.rows("SELECT name FROM models")] == ["tuny"]
    with bench.api.db.owner.begin() as tx:
        upgrade(tx)
    (row,) = bench.api.db.rows("SELECT kind, adapter_artifact_id FROM models")
    assert tuple(row) == ("adapter", None)


def test_a_retry_whose_patch_fits_no_checkpoint_begins_anew_and_says_so(bench: Bench) -> None:
    job = bench.tune(lora_rank=8)
    bench.finish(job, ADAPTER, code=64)
    other = bench.a_file()
    for patch, changed in (
        ({"lora_rank": 4}, "lora_rank"),
        ({"dataset": other}, "dataset"),
        ({"lora_rank": 4, "cutoff_len": 64, "max_steps": 9}, "cutoff_len, lora_rank"),
        ({"max_steps": 9, "num_train_epochs": 1.0, "save_steps": 5}, None),
        ({"lora_rank": 8}, None),
    ):
        answer = bench.http.post(f"/jobs/{job}/retry", json={"patch": patch})
        assert answer.status_code == 201, answer.text
        again = answer.json()
        said = [n["message"] for n in again["notes"] if n["field"] == "from_scratch"]
        if changed is None:
            assert (again["spec"]["from_scratch"], said) == (False, [])
        else:
            sentence = f"no checkpoint of the origin fits another {changed}: it begins anew"
            assert (again["spec"]["from_scratch"], said) == (True, [sentence])


def learned_from(bench: Bench, reward_model: Any) -> dict[str, Any]:
    """A fine-tune of stage grpo that a reward model is to judge."""
    asked = {"kind": "finetune", "stage": "grpo", "model": "tiny", "dataset": bench.file}
    return asked | {"reward_model": reward_model}


def test_a_reward_model_brings_its_base_along_however_it_is_named(bench: Bench) -> None:
    job, adapter = bench.tuned("judge", stage="rm", dataset=bench.a_file("preference"))
    for named in (job, {"from": job}, {"from": f"{job}.adapter"}, "judge"):
        found = bench.submit(**learned_from(bench, named))["inputs"]
        assert (found["reward_model"], found["reward_base"]) == (adapter, base_id(bench))
        assert found["model"] == base_id(bench)
    found = bench.submit(**learned_from(bench, "tiny"))["inputs"]  # what was downloaded whole
    assert found["reward_model"] == base_id(bench)
    assert "reward_base" not in found


def test_a_fine_tune_waits_for_the_reward_model_that_judges_it(bench: Bench) -> None:
    job = bench.tune("judge", stage="rm", dataset=bench.a_file("preference"))
    learning = bench.submit(**learned_from(bench, {"from": job}))
    assert f"{job} (adapter)" in learning["wait_reason"]
    adapter = bench.finish(job, ADAPTER)
    bench.finish(bench.http.get(f"/jobs/{learning['id']}").json()["inputs"]["tokens"], "tokens")
    found = bench.http.get(f"/jobs/{learning['id']}").json()
    assert found["state"] == "queued"
    assert (found["inputs"]["reward_model"], found["inputs"]["reward_base"]) == (
        adapter,
        base_id(bench),
    )


def test_a_reward_model_is_not_asked_for_answers(bench: Bench) -> None:
    job, _ = bench.tuned("judge", stage="rm", dataset=bench.a_file("preference"))
    asked: dict[str, Any] = {"kind": "inference", "prompts": ["Who are you?"]}
    measured = {"kind": "evaluate", "eval_dataset": bench.file, "do_eval": True}
    for asking in (asked, {"kind": "serve"}, measured):
        for named in (
            {"model": "judge"},
            {"model": {"from": job}},
            {"model": "tiny", "adapter": job},
        ):
            error = bench.refused(**asking | named)
            assert error["code"] == "unfit_adapter"
            assert "scores answers and writes none" in error["message"]


def test_what_scores_nothing_is_refused_as_a_reward_model(bench: Bench) -> None:
    job, _ = bench.tuned("tuny")
    bench.merged(job)
    for named in (job, {"from": job}, "tuny", "whole"):
        error = bench.refused(**learned_from(bench, named))
        assert (error["field"], error["code"]) == ("reward_model", "unfit_adapter")
        assert "stage rm" in error["hint"]
    error = bench.refused(**learned_from(bench, "nobody"))
    assert error["field"] == "reward_model"
