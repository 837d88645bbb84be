"""kill -9 of anything in the middle of a real fine-tune: it succeeds without help, bit for bit.

Every test kills one part after the first recorded checkpoint and before half of the steps. The
weights are fp32, so that the adapter's bits can be compared with those of an undisturbed run.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.yards import LocalYard, start, wait_for

from tuneyard.local.status import status

STEPS, SAVE_STEPS = 24, 3


def a_finetune(yard: LocalYard, base_model: str, identity_file: str) -> str:
    """The same real fine-tune each time."""
    return yard.submit(
        kind="finetune",
        model=base_model,
        dataset=identity_file,
        stage="sft",
        finetuning_type="lora",
        lora_rank=4,
        lora_dropout=0.1,
        layers_to_transform=[26, 27, 28, 29],
        cutoff_len=64,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        learning_rate=1e-3,
        seed=7,
        device="cpu",
    )


@pytest.fixture(scope="module")
def undisturbed_sha256(yard: LocalYard, base_model: str, identity_file: str) -> str:
    """The adapter of a run that nobody disturbed."""
    return adapter_sha256(yard, finished(yard, a_finetune(yard, base_model, identity_file)))


def finished(yard: LocalYard, job: str) -> str:
    """Wait for success."""
    end = yard.finish(job, within_s=240)
    assert end["state"] == "succeeded", json.dumps(end, indent=1)
    return job


def adapter_sha256(yard: LocalYard, job: str) -> str:
    """sha256 of adapter_model.safetensors as the artifact's manifest has it."""
    artifacts = yard.get(f"/jobs/{job}/artifacts")["data"]
    adapter = next(a for a in artifacts if a["kind"] == "adapter")
    files = yard.get(f"/jobs/{job}/artifacts/{adapter['id']}/files")["data"]
    return str(next(f["sha256"] for f in files if f["path"] == "adapter_model.safetensors"))


def checkpoint_recorded(yard: LocalYard, job: str) -> bool:
    """Whether the timeline names a checkpoint."""
    return any(e["type"] == "checkpoint" for e in yard.get(f"/jobs/{job}/events")["data"])


def guards(yard: LocalYard, job: str) -> list[dict[str, Any]]:
    """guard.json of each attempt of the job that has a work folder."""
    found = []
    for folder in (yard.home / "work").iterdir():
        try:  # a folder goes when its attempt ends
            if json.loads((folder / "spec.json").read_text())["job"] == job:
                found.append(json.loads((folder / "guard.json").read_text()))
        except FileNotFoundError:
            continue
    return found


def pid_of(yard: LocalYard, part: str, job: str) -> int:
    """The process to kill."""
    if part in ("guard", "runner"):
        (guard,) = guards(yard, job)
        return int(guard["pid" if part == "guard" else "runner_pid"])
    seen = status(yard.home)
    if part == "supervisor":
        assert seen.supervisor_pid is not None
        return seen.supervisor_pid
    return next(child.pid for child in seen.children if child.name == part)


def disturbed(yard: LocalYard, base_model: str, identity_file: str, part: str) -> tuple[str, int]:
    """Submit, kill one part in the middle, and name the job and the runner's pid before."""
    job = a_finetune(yard, base_model, identity_file)
    wait_for(lambda: checkpoint_recorded(yard, job), within_s=120, what="a recorded checkpoint")
    progress = yard.job(job)["progress"]
    assert progress["done"] < STEPS / 2, "the kill would come too late to mean anything"
    (guard,) = guards(yard, job)
    runner = int(guard["runner_pid"])
    os.kill(pid_of(yard, part, job), signal.SIGKILL)
    return job, runner


def steps_by_attempt(yard: LocalYard, job: str) -> dict[int, list[int]]:
    """Attempt's number -> the steps that it computed."""
    with yard.database() as connection:
        rows = connection.execute(
            "SELECT a.number, m.step FROM metrics m JOIN attempts a ON a.id = m.attempt_id"
            " WHERE a.job_id = %s AND m.name = 'loss' ORDER BY 1, 2",
            [job.removeprefix("job_")],
        ).fetchall()
    found: dict[int, list[int]] = {}
    for number, step in rows:
        found.setdefault(number, []).append(step)
    return found


@pytest.mark.parametrize("part", ["api", "scheduler", "worker", "valkey", "postgres"])
def test_the_runner_goes_on_when_a_part_around_it_is_killed(
    yard: LocalYard, base_model: str, identity_file: str, undisturbed_sha256: str, part: str
) -> None:
    job, runner = disturbed(yard, base_model, identity_file, part)
    assert runner_pids_to_the_end(yard, job) == {runner}
    assert adapter_sha256(yard, job) == undisturbed_sha256
    assert steps_by_attempt(yard, job) == {1: list(range(1, STEPS + 1))}


def runner_pids_to_the_end(yard: LocalYard, job: str) -> set[int]:
    """Every runner that the job had from now to its success."""
    seen: set[int] = set()

    def ended() -> bool:
        seen.update(guard["runner_pid"] for guard in guards(yard, job))
        return bool(yard.job(job)["finished_at"])

    wait_for(ended, within_s=240, what=f"the end of {job}")
    finished(yard, job)
    return seen


def test_the_runner_goes_on_when_the_supervisor_is_killed(
    yard: LocalYard, base_model: str, identity_file: str, undisturbed_sha256: str
) -> None:
    job, runner = disturbed(yard, base_model, identity_file, "supervisor")
    start(yard.home, yard.env)
    assert runner_pids_to_the_end(yard, job) == {runner}
    assert adapter_sha256(yard, job) == undisturbed_sha256


@pytest.mark.parametrize("part", ["guard", "runner"])
def test_a_killed_guard_or_runner_costs_only_the_steps_since_the_checkpoint(
    yard: LocalYard, base_model: str, identity_file: str, undisturbed_sha256: str, part: str
) -> None:
    job, _ = disturbed(yard, base_model, identity_file, part)
    finished(yard, job)
    assert adapter_sha256(yard, job) == undisturbed_sha256
    steps = steps_by_attempt(yard, job)
    assert sorted(steps) == [1, 2]
    redone = set(steps[1]) & set(steps[2])
    assert len(redone) <= SAVE_STEPS
    assert set(steps[1]) | set(steps[2]) == set(range(1, STEPS + 1))


def test_nothing_of_any_attempt_is_left_running(yard: LocalYard) -> None:
    left = [
        environ.parent.name
        for environ in Path("/proc").glob("[0-9]*/environ")
        if str(yard.home).encode() in read_or_nothing(environ)
        and b"TUNEYARD_ATTEMPT=" in read_or_nothing(environ)
    ]
    assert left == []


def read_or_nothing(path: Path) -> bytes:
    """A process may end while it is looked at."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
