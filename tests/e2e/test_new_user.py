"""What a new user types: the commands' words, their mistakes, and what stands on the screen."""

import json
from pathlib import Path

import httpx
import pytest
from support.yards import LocalYard, start, wait_for

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_a_yaml_is_submitted_watched_and_listed(
    yard: LocalYard, base_model: str, tmp_path: Path
) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        f"model_name_or_path: {base_model}\ndataset: {EXAMPLES / 'identity.jsonl'}\n"
        "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 2\ncutoff_len: 48\n"
        "layers_to_transform: [29]\nper_device_train_batch_size: 1\nmax_steps: 2\n"
        "learning_rate: 1e-4\nbf16: yes\noutput_dir: saves/mine\n"
    )
    done = yard.cli("submit", str(spec), "--wait")
    assert "mine succeeded" in done.stdout
    assert "output_dir is a name that a merge may say" in done.stdout
    listed = json.loads(yard.cli("list", "--json", "--state", "succeeded").stdout)
    rows = listed["data"] if isinstance(listed, dict) else listed
    job = next(row["id"] for row in rows if row["name"] == "mine")
    shown = json.loads(yard.cli("show", job, "--json").stdout)
    assert (shown["state"], shown["progress"]["done"]) == ("succeeded", 2)
    assert "step 2/2" in yard.cli("logs", job).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("submit", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("submit", "."), 2, "."),
        (("show", "job_xyz"), 2, "job_xyz"),
        (("show", "job_" + "0" * 32), 3, "no such job"),
        (("cancel", "job_" + "0" * 32), 3, "no such job"),
        (("models", "show", "nothing"), 3, "no such model"),
        (("infer", "nothing", "--prompts", "nowhere.txt"), 2, "nowhere.txt"),
        (("lst",), 2, "lst"),
        (("list", "--limit", "0"), 2, "limit"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence_and_no_traceback(
    yard: LocalYard, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = yard.cli(*arguments, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_bad_spec_names_every_mistake_and_leaves_nothing_behind(
    yard: LocalYard, tmp_path: Path
) -> None:
    before = yard.get("/files")["data"], yard.get("/jobs")["data"]
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    spec = tmp_path / "bad.yaml"
    spec.write_text("model: base\ndataset: data.jsonl\nlora_rnak: 8\nlora_dropout: 2\n")
    done = yard.cli("submit", str(spec), check=False)
    assert done.returncode == 2
    assert "did you mean lora_rank?" in done.stderr
    assert "lora_dropout" in done.stderr
    assert (yard.get("/files")["data"], yard.get("/jobs")["data"]) == before


def test_bad_rows_are_named_by_file_and_line(yard: LocalYard, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"promt": "a", "output": "b"}\n')
    done = yard.cli("files", "put", str(data), check=False)
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr
    assert "2" in done.stderr
    assert "instruction" in done.stderr


def test_a_second_up_on_one_home_says_that_the_first_is_running(yard: LocalYard) -> None:
    done = yard.cli("up", "--home", str(yard.home), "--detach", check=False)
    assert done.returncode != 0
    assert "running" in done.stderr
    assert yard.profile["url"] in done.stderr


def test_a_cancelled_fine_tune_stops_at_a_checkpoint_and_a_retry_goes_on_from_it(
    yard: LocalYard, base_model: str, identity_file: str
) -> None:
    job = yard.submit(
        kind="finetune",
        model=base_model,
        dataset=identity_file,
        lora_rank=2,
        layers_to_transform=[29],
        cutoff_len=48,
        per_device_train_batch_size=1,
        max_steps=60,
        device="cpu",
    )
    wait_for(
        lambda: (yard.job(job)["progress"] or {}).get("done", 0) >= 5, within_s=60, what="5 steps"
    )
    yard.cli("cancel", job)
    assert yard.finish(job)["state"] == "cancelled"
    again = json.loads(yard.cli("retry", job, "--json").stdout)["id"]
    assert yard.finish(again)["state"] == "succeeded"
    steps = [point["step"] for point in yard.get(f"/jobs/{again}/metrics")["data"]]
    assert min(steps) > 1
    assert max(steps) == 60


def test_flower_shows_the_task_of_a_job_by_itself_and_through_the_api(
    yard: LocalYard, base_model: str
) -> None:
    job = yard.submit(kind="inference", model=base_model, prompts=["Hello"], max_new_tokens=4)
    yard.finish(job)

    def shown() -> dict[str, object] | None:
        tasks = httpx.get(yard.profile["flower_url"] + "/api/tasks", trust_env=False).json()
        found = [task for key, task in tasks.items() if key.startswith(job)]
        return found[0] if found and found[0]["state"] == "SUCCESS" else None

    task = wait_for(shown, within_s=20, what="the task in Flower")
    assert task["name"] == "tuneyard.inference"
    headers = {"Authorization": f"Bearer {yard.profile['api_key']}"}
    url = f"{yard.profile['url']}/flower/api/task/info/{job}.1"
    assert httpx.get(url, headers=headers, trust_env=False).json()["state"] == "SUCCESS"


def test_everything_comes_back_after_down_and_up(yard: LocalYard) -> None:
    jobs = yard.get("/jobs")["data"]
    yard.cli("down", "--home", str(yard.home))
    start(yard.home, yard.env)
    assert yard.get("/jobs")["data"] == jobs
