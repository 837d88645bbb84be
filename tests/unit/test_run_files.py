"""What a fine-tune leaves beside its weights, as LLaMA-Factory's users read it."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset, a_tiny_base
from transformers import LlamaForCausalLM, TrainerState

from tuneyard.runners.finetune import finetune
from tuneyard.runners.merged_folder import base_files
from tuneyard.runners.run_files import RUN_FILES
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.jobs import read_spec
from tuneyard.store.folder import verify_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "val_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "plot_loss": True,
}
IDS = {"model": "tiny", "dataset": "file_" + "1" * 32}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": a_tiny_base(folder / "base"), "dataset": a_dataset(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, inputs) -> Ran:
    return tune(tmp_path_factory.mktemp("run"), inputs)


def tune(
    folder: Path, inputs: dict[str, Path], *, resume: Path | None = None, **arguments: object
) -> Ran:
    ran = run_here(
        folder,
        finetune,
        inputs=inputs,
        input_ids=IDS,
        resume=resume and str(resume),
        arguments=ARGUMENTS | arguments,
    )
    assert ran.code == ExitCode.DONE
    return ran


def said(ran: Ran, name: str) -> dict:
    return json.loads((ran.workdir / "output" / name).read_text())


def lines(ran: Ran) -> list[dict]:
    text = (ran.workdir / "output" / "trainer_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_log_has_the_names_that_llama_factorys_readers_look_for(ran):
    steps = [line for line in lines(ran) if "loss" in line]
    names = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "total_tokens"}
    assert all(names <= line.keys() for line in steps)
    assert [line["percentage"] for line in steps] == [25.0, 50.0, 75.0, 100.0]
    measured = ran.metric("eval_loss")
    assert {x["current_steps"]: x["eval_loss"] for x in lines(ran) if "eval_loss" in x} == measured


def test_a_line_has_the_mean_of_the_steps_since_the_last_one_also_of_a_resumed_run(
    tmp_path, inputs
):
    """As transformers logs it: with logging_steps 3 a line speaks of three steps."""
    logged = {"logging_steps": 3, "save_steps": 2}
    whole = tune(tmp_path, inputs, **logged)
    losses = whole.metric("loss")
    means = [sum(losses[step] for step in (1, 2, 3)) / 3, losses[4]]
    assert [x["loss"] for x in lines(whole) if "loss" in x] == pytest.approx(means)

    checkpoint = whole.workdir / whole.of_type("checkpoint")[0]["path"]
    resumed = tune(tmp_path / "resumed", inputs, resume=checkpoint, **logged)
    assert min(resumed.metric("loss")) == 3
    assert lines(resumed) == lines(whole)


def test_transformers_reads_the_trainers_state(ran):
    state = TrainerState.load_from_json(str(ran.workdir / "output" / "trainer_state.json"))
    losses, measured = ran.metric("loss"), ran.metric("eval_loss")
    history = state.log_history
    assert {line["step"]: line["loss"] for line in history if "loss" in line} == losses
    assert {x["step"]: x["eval_loss"] for x in history if "eval_loss" in x} == measured
    assert (state.global_step, state.max_steps, state.train_batch_size) == (4, 4, 2)
    assert state.epoch == pytest.approx(4 / 3)  # six rows, two a step
    best = min((value, step) for step, value in measured.items() if step)
    assert (state.best_metric, state.best_global_step) == best


def test_the_results_are_the_means_and_the_last_measures(ran):
    losses, measured = ran.metric("loss"), ran.metric("eval_loss")
    train, evaluated = said(ran, "train_results.json"), said(ran, "eval_results.json")
    assert train["train_loss"] == pytest.approx(sum(losses.values()) / 4)
    assert (train["train_samples"], evaluated["eval_samples"]) == (6, 2)
    assert evaluated["eval_loss"] == measured[4]
    assert said(ran, "all_results.json") == train | evaluated


def test_what_was_not_measured_has_no_file(tmp_path, inputs):
    plain = tune(tmp_path, inputs, val_size=0, eval_strategy="no", plot_loss=False)
    there = {path.name for path in (plain.workdir / "output").iterdir()}
    unsaid = {"generated_predictions.jsonl", "predict_results.json", "watch_prompts.jsonl"}
    assert there & RUN_FILES == RUN_FILES - {"eval_results.json", "training_loss.png"} - unsaid
    assert said(plain, "all_results.json") == said(plain, "train_results.json")


def test_the_arguments_that_applied_can_be_submitted_again(ran):
    written = yaml.safe_load((ran.workdir / "output" / "training_args.yaml").read_text())
    assert written["model_name_or_path"] == "tiny"
    assert (written["lora_alpha"], written["seed"], written["save_steps"]) == (16, 42, 500)
    spec, notes = read_spec(written)
    assert not [note for note in notes if "no effect" in note.message and note.field != "do_train"]
    first, _ = read_spec({"kind": "finetune", **IDS, **ARGUMENTS, "lora_alpha": 16})
    filled_in = {"eval_steps", "output_dir"}
    again = {k: v for k, v in spec.arguments().items() if k not in filled_in}
    assert again == {k: v for k, v in first.arguments().items() if k not in filled_in}


def test_the_same_run_leaves_the_same_bytes(tmp_path, inputs, ran):
    assert verify_folder(tune(tmp_path, inputs).workdir / "output") == verify_folder(
        ran.workdir / "output"
    )


def test_peft_loads_the_folder_whatever_else_lies_in_it(inputs, ran):
    base = LlamaForCausalLM.from_pretrained(inputs["model"])
    model = PeftModel.from_pretrained(base, ran.workdir / "output")
    assert model.peft_config["default"].r == 8


def test_nothing_that_is_made_of_a_model_carries_its_runs_files(ran):
    assert not {path.name for path in base_files(ran.workdir / "output")} & RUN_FILES


def test_the_losses_are_drawn(ran):
    picture = (ran.workdir / "output" / "training_loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert not ran.of_type("warning")


def test_without_matplotlib_the_run_says_so_and_goes_on(tmp_path, inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plain = tune(tmp_path, inputs)
    (warning,) = plain.of_type("warning")
    assert (warning["code"], "matplotlib" in warning["message"]) == ("plot_failed", True)
    assert not (plain.workdir / "output" / "training_loss.png").exists()


def test_what_the_weights_follow_from_is_written_down(tmp_path, inputs):
    digests = {"model": "a" * 64, "dataset": "b" * 64}
    known = run_here(
        tmp_path,
        finetune,
        inputs=inputs,
        input_ids=IDS,
        input_digests=digests,
        arguments=ARGUMENTS | {"plot_loss": False, "seed": 7},
    )
    found = said(known, "reproduction.json")
    assert {name: each["sha256"] for name, each in found["inputs"].items()} == digests
    assert {name: each["id"] for name, each in found["inputs"].items()} == IDS
    assert found["seed"] == 7
    assert found["platform"]["threads"] >= 1
    assert found["platform"]["processor"]
    assert {"torch", "transformers", "peft", "python", "tuneyard"} <= found["versions"].keys()
