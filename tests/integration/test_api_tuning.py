"""Ways to tune at submission: what they bring forth, what they go on from, what is refused."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from support.apis import Api
from support.benches import ADAPTER, MODEL, Bench


@pytest.fixture
def bench(api: Api, a_node: Callable[..., UUID]) -> Iterator[Bench]:
    with api.client() as http:
        yield Bench(api, http, a_node(gpus=0))


def fully_tuned(bench: Bench, name: str = "fully", **more: Any) -> tuple[str, str]:
    """A finished fine-tune of whole weights, and its model."""
    job = bench.tune(name, finetuning_type="full", **more)
    return job, bench.finish(job, MODEL)


def test_whole_weights_bring_forth_a_model_that_is_asked_and_tuned_on(bench: Bench) -> None:
    job, model = fully_tuned(bench)
    shown = bench.model("fully")
    assert (shown["kind"], shown["base_model"], shown["job"]) == ("whole", "tiny", job)
    assert (shown["artifact"], shown["adapter"]) == (model, None)
    for named in ("fully", job, {"from": job}, {"from": f"{job}.model"}, shown["id"]):
        assert bench.submit(kind="inference", model=named, prompts=["Who?"])["inputs"] == {
            "model": model
        }
        assert bench.submit(kind="serve", model=named)["inputs"] == {"model": model}
    _, adapter = bench.tuned("second", model="fully")
    asked = bench.submit(kind="inference", model="second", prompts=["Who?"])
    assert asked["inputs"] == {"model": model, "adapter": adapter}
    fully_tuned(bench, "third", model="fully", freeze_extra_modules="norm")
    assert bench.model("third")["base_model"] == "fully"
    assert bench.merged("second", "merged")[1]


def test_what_waits_for_whole_weights_waits_for_a_model(bench: Bench) -> None:
    job = bench.tune("fully", finetuning_type="freeze")
    asked = bench.submit(kind="inference", model={"from": job}, prompts=["Who?"])
    assert asked["wait_reason"] == f"waits for {job} (model)"
    model = bench.finish(job, MODEL)
    assert bench.http.get(f"/jobs/{asked['id']}").json()["inputs"] == {"model": model}


def test_what_cannot_be_merged_says_so_when_the_merge_is_submitted(bench: Bench) -> None:
    running = bench.tune("running", finetuning_type="full")
    fully_tuned(bench)
    for named in ("fully", running, {"from": running}, {"from": f"{running}.model"}):
        error = bench.refused(kind="merge", adapter=named)
        assert (error["code"], error["field"]) == ("not_an_adapter", "adapter")
        assert error["hint"] == "ask it, or tune it on, as it is: model: its name"
    for kind in ("prefix", "p-tuning", "prompt_tuning"):
        job = bench.tune(f"by-{kind}", finetuning_type=kind)
        for named in (job, f"by-{kind}"):
            error = bench.refused(kind="merge", adapter=named)
            assert (error["code"], error["field"]) == ("unfit_adapter", "adapter")
            assert "cannot be merged" in error["message"]
            assert "finetuning_type lora" in error["hint"]
        adapter = bench.finish(job, ADAPTER)
        assert bench.refused(kind="merge", adapter=f"by-{kind}")["code"] == "unfit_adapter"
        asked = bench.submit(kind="inference", model=f"by-{kind}", prompts=["Who?"])
        assert asked["inputs"]["adapter"] == adapter
    for kind in ("oft", "adalora", "vera", "ia3"):
        bench.tuned(f"by-{kind}", finetuning_type=kind)
        assert bench.submit(kind="merge", adapter=f"by-{kind}")["state"] == "queued"


def test_a_pipeline_that_would_merge_whole_weights_is_refused_as_a_whole(bench: Bench) -> None:
    steps = [
        {"name": "tune", "kind": "finetune", "model": "tiny", "dataset": bench.file,
         "finetuning_type": "full"},
        {"kind": "merge", "adapter": {"from": "tune"}},
    ]  # fmt: skip
    error = bench.refused(pipeline=steps)
    assert (error["code"], error["field"]) == ("not_an_adapter", "pipeline[1].adapter")


def test_a_fine_tune_goes_on_from_adapters_in_their_order(bench: Bench) -> None:
    _, one = bench.tuned("one")
    _, two = bench.tuned("two")
    base = bench.submit(kind="inference", model="tiny", prompts=["x"])["inputs"]["model"]
    for named in ("one,two", ["one", "two"], ["one", {"from": bench.model("two")["job"]}]):
        job = bench.tune("on", adapter_name_or_path=named)
        inputs = bench.http.get(f"/jobs/{job}").json()["inputs"]
        assert (inputs["model"], inputs["adapter"], inputs["adapter_2"]) == (base, one, two)
    on, adapter = bench.tuned("again", adapter="one", create_new_adapter=True)
    asked = bench.submit(kind="inference", model="again", prompts=["Who?"])
    assert asked["inputs"] == {"model": base, "adapter": adapter}
    assert bench.submit(kind="merge", adapter=on)["inputs"] == {"model": base, "adapter": adapter}
    retried = bench.http.post(f"/jobs/{on}/retry", json={"patch": {"adapter": "two"}}).json()
    assert retried["inputs"]["adapter"] == two


def test_a_pipeline_goes_on_from_its_own_steps(bench: Bench) -> None:
    tune = {"kind": "finetune", "model": "tiny", "dataset": bench.file}
    steps = [
        tune | {"name": "one"},
        tune | {"name": "two", "adapter": {"from": "one"}, "create_new_adapter": True},
        tune | {"name": "three", "adapter": [{"from": "one"}, {"from": "two"}]},
    ]
    answer = bench.http.post("/jobs", json={"pipeline": steps})
    assert answer.status_code == 201, answer.text
    one, two, three = answer.json()["jobs"]
    assert f"{one['id']} (adapter)" in two["wait_reason"]
    assert f"{two['id']} (adapter)" in three["wait_reason"]


def test_what_a_base_cannot_be_asked_with_is_refused_at_submission(bench: Bench) -> None:
    pairs = bench.a_file("preference")
    bench.tuned("plain")
    bench.tuned("other")
    bench.tuned("scores", stage="rm", dataset=pairs)
    fully_tuned(bench)
    asks: dict[str, Any] = {"kind": "inference", "prompts": ["Who?"]}
    measures = {"kind": "evaluate", "eval_dataset": bench.file, "do_eval": True}
    for job in (asks, measures, {"kind": "serve"}):
        for more, field, code in (
            ({"model": "scores"}, "model", "unfit_adapter"),
            ({"model": "tiny", "adapter": "scores"}, "adapter", "unfit_adapter"),
            ({"model": "fully", "adapter": "plain"}, "model", "base_mismatch"),
            ({"model": "plain", "adapter": "other"}, "adapter", "conflicting_fields"),
        ):
            error = bench.refused(**(job | more))
            assert (error["field"], error["code"]) == (field, code), (job, more)
        assert bench.submit(**(job | {"model": "tiny", "adapter": "plain"}))["inputs"]["adapter"]
    compared = {"stage": "dpo", "dataset": pairs, "ref_model_adapters": "scores"}
    error = bench.refused(**({"kind": "finetune", "model": "tiny"} | compared))
    assert (error["field"], error["code"]) == ("ref_model_adapters", "unfit_adapter")


def test_what_cannot_go_on_is_refused_with_what_to_do(bench: Bench) -> None:
    bench.tuned("plain")
    bench.tuned("weighted", use_dora=True)
    bench.tuned("turned", finetuning_type="oft")
    bench.tuned("scaled", finetuning_type="ia3")
    fully_tuned(bench)
    bench.tuned("elsewhere", model="fully")
    tune = {"kind": "finetune", "model": "tiny", "dataset": bench.file}
    for more, field, code, hint in (
        ({"adapter": "nothing"}, "adapter", "model_not_found", "known here"),
        ({"adapter": "fully"}, "adapter", "not_an_adapter", "tune it on"),
        ({"adapter": "tiny"}, "adapter", "not_an_adapter", "name a tuned model"),
        ({"adapter": "turned"}, "adapter", "unfit_adapter", "finetuning_type oft"),
        ({"adapter": "scaled"}, "adapter", "unfit_adapter", "merge it first"),
        ({"adapter": "plain", "finetuning_type": "oft"}, "adapter", "unfit_adapter", "type lora"),
        ({"adapter": "weighted,plain"}, "adapter", "unfit_adapter", "merge it first"),
        ({"adapter": ["plain", "turned"]}, "adapter_2", "unfit_adapter", "finetuning_type oft"),
        ({"adapter": "weighted", "create_new_adapter": True}, "adapter", "unfit_adapter", "merge"),
        ({"adapter": "elsewhere"}, "model", "base_mismatch", "model: fully"),
        ({"adapter": "plain", "model": "fully"}, "model", "base_mismatch", "model: tiny"),
    ):
        error = bench.refused(**(tune | more))  # type: ignore[arg-type]
        assert (error["field"], error["code"]) == (field, code), (more, error)
        assert hint in error["hint"], (more, error)
    assert bench.tune("on", adapter="weighted")
