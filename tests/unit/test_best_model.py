"""Which model a run leaves: that of the best evaluation, and no step more than patience allows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from safetensors.torch import load_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import ANIMALS, a_dataset, a_tiny_base

from tuneyard.models.artifacts import KeptCheckpoint
from tuneyard.runners.best_model import Ranking, measure_of
from tuneyard.runners.checkpoint import Position
from tuneyard.runners.finetune import finetune
from tuneyard.runners.preferences import PairLoss
from tuneyard.runners.reference import Reference
from tuneyard.runners.retention import checkpoint_meta
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.runner import RunnerSpec
from tuneyard.store.disk import DiskStore
from tuneyard.store.folder import manifest_digest, publish_folder, read_manifest
from tuneyard.workers.staging import lay_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SOON_WORSE = {
    "per_device_train_batch_size": 8,
    "learning_rate": 0.005,  # smooth, and 0.08 from the next best: no processor sees another best
    "lr_scheduler_type": "constant",
    "max_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "seed": 3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Rows of another kind: learning the first ones helps for a while, then no more."""
    rows = [
        {"instruction": f"How old is a {a}?", "output": f"{i} y"} for i, a in enumerate(ANIMALS)
    ]
    return a_dataset(tmp_path_factory.mktemp("others") / "rows.jsonl", rows)


@pytest.fixture
def tune(tmp_path, base, dataset, others):
    def run(*, resume: Path | None = None, eval_rows: Path = others, **arguments) -> Ran:
        inputs = {"model": base, "dataset": dataset, "eval_dataset": eval_rows}
        return run_here(
            tmp_path,
            finetune,
            inputs=inputs,
            resume=resume and str(resume),
            arguments=SOON_WORSE | arguments,
        )

    return run


def result(ran: Ran) -> dict:
    (found,) = ran.of_type("result")
    return found["values"]


def best_of(ran: Ran) -> int:
    losses = {step: loss for step, loss in ran.metric("eval_loss").items() if step}
    return min(losses, key=losses.__getitem__)


def newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def same_adapter(ran: Ran, checkpoint: Path) -> bool:
    one, other = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (ran.workdir / "output", checkpoint)
    )
    return all(one[name].equal(other[name]) for name in one)


def test_the_best_model_is_the_result_where_it_was_asked_for(tune):
    last, best = tune(), tune(load_best_model_at_end=True)
    step = best_of(best)
    assert 1 < step < 10  # else this test shows nothing
    assert result(best)["loaded_step"] == result(best)["best_step"] == step
    assert result(best)["eval_loss"] == best.metric("eval_loss")[step]
    assert same_adapter(best, best.workdir / "checkpoints" / f"step-{step}")
    assert json.loads((best.workdir / "output" / "tuneyard.json").read_text())["steps"] == step
    assert "loaded_step" not in result(last)
    assert last.adapter_sha256 != best.adapter_sha256


def test_the_best_is_kept_as_soon_as_it_is_measured(tune):
    ran = tune(load_best_model_at_end=True, save_strategy="best")
    losses, lowest, kept = ran.metric("eval_loss"), float("inf"), []
    for step in range(1, 11):
        if losses[step] < lowest:
            lowest, kept = losses[step], [*kept, step]
    assert [event["step"] for event in ran.of_type("checkpoint")] == kept
    assert result(ran)["best_step"] == kept[-1]
    for event in ran.of_type("checkpoint")[-1:]:
        assert read_manifest(ran.workdir / event["path"])["rank"] == losses[event["step"]]


def test_what_is_kept_before_held_out_rows_are_answered_is_the_last_step_and_not_the_best(tune):
    predicting = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 2}
    ran = tune(**predicting, load_best_model_at_end=True, save_strategy="best")
    kept = max((ran.workdir / "checkpoints").glob("step-*"), key=lambda f: int(f.name[5:]))
    assert result(ran)["loaded_step"] < int(kept.name[5:]) == 10
    assert not same_adapter(ran, kept)


def test_a_run_ends_when_patience_does_and_is_a_success_that_says_so(tune):
    ran = tune(early_stopping_steps=3)
    step = best_of(ran)
    assert ran.code == ExitCode.DONE
    assert result(ran)["stopped_early"] is True
    assert result(ran)["steps"] == step + 3 == max(ran.metric("loss"))
    (warning,) = ran.of_type("warning")
    assert warning["code"] == "stopped_early"
    assert f"that of step {step}" in warning["message"]
    assert (
        ran.of_type("progress")[-1] | {"done": step + 3, "total": step + 3}
        == (ran.of_type("progress")[-1])
    )


def test_patience_and_the_best_model_survive_a_resume(tune):
    told = {"early_stopping_steps": 3, "load_best_model_at_end": True, "save_total_limit": 9}
    whole = tune(**told)
    step = best_of(whole)
    for at in (step - 1, step, step + 2, step + 3):
        resumed = tune(**told, resume=whole.workdir / "checkpoints" / f"step-{at}")
        assert result(resumed) == result(whole)
        assert resumed.adapter_sha256 == whole.adapter_sha256


def test_a_best_checkpoint_that_is_gone_is_said_at_the_beginning_and_the_next_best_taken(
    tune, tmp_path
):
    told = {"load_best_model_at_end": True, "save_total_limit": 9}
    whole = tune(**told)
    step = best_of(whole)
    alone = tmp_path / "alone" / f"step-{step + 2}"
    shutil.copytree(whole.workdir / "checkpoints" / alone.name, alone)
    resumed = tune(**told, resume=alone)
    (warning,) = resumed.of_type("warning")
    assert warning["code"] == "best_gone"
    losses = resumed.metric("eval_loss")
    assert result(resumed)["best_step"] == min(losses, key=losses.__getitem__) > step + 2


@pytest.mark.parametrize("changed", ["rows", "loss", "metric"])
def test_evaluations_by_another_measure_are_not_compared(tune, tmp_path, dataset, changed):
    told = {"load_best_model_at_end": True, "early_stopping_steps": 2, "save_total_limit": 9}
    first = tune(**told)
    last = newest(first.workdir / "checkpoints")
    assert result(first)["loaded_step"] < result(first)["steps"] < 10
    rows = a_dataset(tmp_path / "harder.jsonl", [{"instruction": "x", "output": "zq" * 9}])
    accuracy = {"compute_accuracy": True, "metric_for_best_model": "eval_accuracy"}
    other = {
        "rows": {"eval_rows": rows},
        "loss": {"label_smoothing_factor": 0.3},
        "metric": accuracy,
    }[changed]
    again = tune(**told, resume=last, **other)
    (warning,) = again.of_type("warning")[:1]
    assert warning["code"] == "best_by_another_measure"
    step = int(last.name.removeprefix("step-"))
    losses = again.metric("eval_loss")
    assert min(losses) == step  # measured anew, as the new measure has it
    assert result(again)["best_step"] >= step
    assert result(again)["steps"] > step


def test_who_judges_is_part_of_the_measure():
    def measured(*, reference: str = "base", reward_model: str = "a") -> str:
        objective = PairLoss("sigmoid", 0.1, Reference(said=reference))
        asked = SimpleNamespace(arguments=SimpleNamespace(stage="dpo"))
        attempt = SimpleNamespace(
            spec=RunnerSpec(kind="finetune", input_ids={"reward_model": reward_model})
        )
        return measure_of(Ranking(), objective, asked, attempt, "rows")

    assert measured() == measured()
    others = measured(reference="adapter as it began"), measured(reward_model="b")
    assert len({measured(), *others}) == 3


def test_the_files_say_what_the_model_that_was_taken_came_to(tune):
    ran = tune(load_best_model_at_end=True)
    told = json.loads((ran.workdir / "output" / "all_results.json").read_text())
    assert ran.metric("eval_loss")[best_of(ran)] == told["eval_loss"] == result(ran)["eval_loss"]
    assert told["eval_loss"] < ran.metric("eval_loss")[10]


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(tune):
    ran = tune(metric_for_best_model="eval_accuracy", load_best_model_at_end=True)
    assert ran.code == ExitCode.BAD_SPEC
    assert "does not measure accuracy. (one of: loss)" in ran.failure["evidence"]
    assert not ran.metric("loss")


def test_more_is_better_where_the_metric_is_no_loss():
    at, ranking = Position(), Ranking("accuracy", greater=True, patience=2)
    for at.step, value in enumerate([0.5, 0.6, 0.6, float("nan")], start=1):
        at.eval_loss = 1 / at.step
        assert not ranking.is_over(at)
        ranking.take(at, value)
    assert (at.best_metric, at.best_step, at.best_loss) == (0.6, 2, 0.5)
    assert ranking.is_over(at)


@pytest.mark.parametrize(
    ("told", "field", "said"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "eval_strategy: steps"),
        ({"early_stopping_steps": 2}, "early_stopping_steps", "val_size or eval_dataset"),
        ({"save_strategy": "best"}, "save_strategy", "eval_strategy: steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type", "eval_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "val_size": 0.1},
            "save_strategy",
            "save_strategy: epoch",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "val_size": 0.1}
            | {"eval_steps": 3, "save_steps": 10},
            "save_steps",
            "save_strategy: best",
        ),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model", "one of: loss"),
        ({"early_stopping_steps": 0}, "early_stopping_steps", "out of range"),
    ],
)
def test_wishes_that_evaluations_cannot_fulfil_are_refused(told, field, said):
    with pytest.raises(SpecRejected) as refused:
        read_spec({"kind": "finetune", "model": "m", "dataset": "d"} | told)
    (problem,) = [each for each in refused.value.problems if each.field == field]
    assert said in f"{problem.message} {problem.hint}"


def test_files_of_llamafactory_that_ask_for_the_best_model_are_understood():
    spec, _ = read_spec(
        {
            "kind": "finetune",
            "model": "m",
            "dataset": "d",
            "val_size": 0.1,
            "evaluation_strategy": "steps",
            "eval_steps": 100,
            "save_steps": 200,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "early_stopping_steps": 3,
        }
    )
    assert (spec.best_metric, spec.greater_is_best) == ("loss", False)


def test_a_worker_lays_the_best_checkpoint_beside_the_one_that_is_resumed(tmp_path):
    store = DiskStore(tmp_path / "store")
    kept = []
    for step in (5, 4, 2):
        aside = tmp_path / f".aside-{step}"
        aside.mkdir()
        (aside / "state.json").write_text(str(step))
        made = tmp_path / f"step-{step}"
        manifest = publish_folder(aside, made, checkpoint_meta(step, best_step=2))
        store.put_folder(made, "artifacts", artifact := uuid4())
        kept.append(KeptCheckpoint(artifact, step, manifest_digest(manifest)))
    for told, laid in (({}, ["step-5"]), ({"load_best_model_at_end": True}, ["step-2", "step-5"])):
        workdir = tmp_path / f"work-{len(told)}"
        resume, rejected = lay_checkpoints(kept, told, workdir, store)
        assert (resume, rejected) == (workdir / "resume" / "step-5", [])
        assert sorted(path.name for path in resume.parent.iterdir()) == laid
    gone = [*kept[:2], replace(kept[2], id=uuid4())]
    told, workdir = {"load_best_model_at_end": True}, tmp_path / "work-without"
    resume, (said,) = lay_checkpoints(gone, told, workdir, store)
    assert said == "checkpoint of step 2 rejected: it is gone"
    assert resume == workdir / "resume" / "step-5"
