"""Measuring a model on rows, with nothing trained. Tiny model, fp32, CPU."""

import json
from pathlib import Path

import pytest
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset, a_tiny_base

from tuneyard.runners.evaluate import evaluate
from tuneyard.runners.finetune import finetune
from tuneyard.specs.exits import ExitCode

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SAME = {"val_size": 3, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


def written(ran: Ran, name: str) -> str:
    return (ran.workdir / "output" / name).read_text(encoding="utf-8")


def measure(folder: Path, inputs: dict[str, Path], **arguments) -> Ran:
    return run_here(folder, evaluate, kind="evaluate", inputs=inputs, arguments=arguments)


def test_an_adapter_is_measured_as_the_fine_tune_measured_it(tmp_path, base, dataset):
    inputs = {"model": base, "dataset": dataset}
    asking = {**SAME, "do_eval": True, "per_device_eval_batch_size": 2}
    tuning = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    tuned = run_here(tmp_path, finetune, inputs=inputs, arguments=tuning | asking)
    again = measure(tmp_path, inputs | {"adapter": tuned.workdir / "output"}, **asking)
    assert again.code == ExitCode.DONE, again.failure
    name = "generated_predictions.jsonl"
    assert written(again, name) == written(tuned, name)
    name = "predict_results.json"
    assert json.loads(written(again, name)) == json.loads(written(tuned, name))
    assert again.metric("eval_loss")[0] == pytest.approx(tuned.metric("eval_loss")[4], rel=1e-5)
    alone = measure(tmp_path, inputs, **asking)
    assert alone.metric("eval_loss")[0] == pytest.approx(tuned.metric("eval_loss")[0], rel=1e-5)
    everything = json.loads(written(again, "all_results.json"))
    parts = [json.loads(written(again, f"{part}_results.json")) for part in ("eval", "predict")]
    assert everything == parts[0] | parts[1]


@pytest.mark.parametrize("packing", ["packing", "neat_packing"])
def test_rows_are_packed_as_the_fine_tune_packed_them(tmp_path, base, dataset, packing):
    inputs = {"model": base, "dataset": dataset, "eval_dataset": dataset}
    asking = {packing: True, "cutoff_len": 128, "do_eval": True}
    tuned = run_here(tmp_path, finetune, inputs=inputs, arguments={"max_steps": 1} | asking)
    alone = measure(tmp_path, {"model": base, "eval_dataset": dataset}, **asking)
    assert alone.metric("eval_loss")[0] == pytest.approx(tuned.metric("eval_loss")[0], rel=1e-5)
    packs = alone.of_type("progress")[-1]["total"]
    assert 1 < packs < len(dataset.read_text(encoding="utf-8").splitlines())


def test_accuracy_is_measured_without_a_word_said(tmp_path, base, dataset):
    inputs = {"model": base, "eval_dataset": dataset}
    ran = measure(tmp_path, inputs, do_eval=True, compute_accuracy=True)
    assert 0 <= ran.metric("eval_accuracy")[0] <= 1
    files = {path.name for path in (ran.workdir / "output").iterdir()}
    assert files == {"eval_results.json", "all_results.json", "manifest.json"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "do_eval"),
        ({"do_predict": True}, "predict_with_generate"),
        ({"do_eval": True, "val_size": 2}, "val_size"),
        ({"do_eval": True, "fp16": True, "bf16": True}, "bf16"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, base, dataset, arguments, field):
    ran = measure(tmp_path, {"model": base, "eval_dataset": dataset}, **arguments)
    assert ran.code == ExitCode.BAD_SPEC
    assert ran.failure["evidence"].startswith(f"{field}: ")


def test_without_rows_there_is_nothing_to_measure(tmp_path, base, dataset):
    ran = measure(tmp_path, {"model": base, "dataset": dataset}, do_eval=True)
    assert (ran.code, ran.failure["evidence"][:9]) == (ExitCode.BAD_SPEC, "do_eval: ")
