"""The journey on a machine with an NVIDIA GPU and no network, and NVML's view of the runner.

    python -P bench/gpu_journey.py DATA.json [--hidden 1024 --layers 16 --steps 200]

Starts a yard in a folder of its own beside a random Llama (`tuneyard fixtures tiny-llama`), posts
download, finetune, merge and inference as one pipeline over HTTP, and asks NVML which processes
compute on which GPU while the fine-tune runs. Prints the seconds of each job, tokens/s as the
runner reports them, and the GPU of the allocation beside the GPU that NVML names. Exit code 1 when
a job does not succeed or NVML names another GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pynvml

TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]
ENDED = ("succeeded", "failed", "cancelled")
QUESTIONS = ["保持健康的三个提示。", "你是谁"]
GIVE_UP_S = 480.0


def main() -> int:
    """Run the journey; 0 if every job succeeded where NVML saw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    pynvml.nvmlInit()
    with tempfile.TemporaryDirectory() as folder:
        home, models = Path(folder, "home"), Path(folder, "models")
        models.mkdir()
        size = ["--hidden", str(asked.hidden), "--layers", str(asked.layers)]
        tuneyard("fixtures", "tiny-llama", str(models / "tiny"), *size)
        began = time.monotonic()
        up = ("up", "--home", str(home), "--port", "0", "--detach", "--json")
        profile = json.loads(tuneyard(*up, TUNEYARD_NODE_ROOTS=str(models)))
        print(f"up after {time.monotonic() - began:.1f} s")
        try:
            url, key = f"{profile['url']}/api/v1", f"Bearer {profile['api_key']}"
            with httpx.Client(base_url=url, headers={"Authorization": key}, timeout=60) as http:
                return journey(http, asked.data, models / "tiny", steps=asked.steps)
        finally:
            tuneyard("down", "--home", str(home))


def tuneyard(*arguments: str, **environment: str) -> str:
    """What a command prints."""
    env = os.environ | environment
    done = subprocess.run([*TUNEYARD, *arguments], env=env, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


def journey(http: httpx.Client, data: Path, model: Path, *, steps: int) -> int:
    """Submit, look while it runs, and report."""
    with data.open("rb") as rows:
        file = answered(http.post("/files", files={"file": (data.name, rows)}))["id"]
    pipeline = answered(http.post("/jobs", json={"pipeline": the_pipeline(file, model, steps)}))
    seen: dict[str, Any] = {}
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        jobs = answered(http.get(f"/pipelines/{pipeline['id']}"))["jobs"]
        tune = next(job for job in jobs if job["kind"] == "finetune")
        if not seen:
            seen = look(http, tune["id"])
        if all(job["state"] in ENDED for job in jobs) or time.monotonic() > deadline:
            print(last_metrics(http, tune["id"]))
            return report([answered(http.get(f"/jobs/{job['id']}")) for job in jobs], seen)
        time.sleep(0.2)


def the_pipeline(file: str, model: Path, steps: int) -> list[dict[str, Any]]:
    """Download, fine-tune, merge, ask."""
    return [
        {"name": "base", "kind": "download", "source": f"node:{model}", "model_name": "tiny"},
        {
            "name": "tune",
            "kind": "finetune",
            "model": {"from": "base"},
            "dataset": file,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_target": "all",
            "cutoff_len": 1024,
            "per_device_train_batch_size": 16,
            "max_steps": steps,
            "bf16": True,
            "logging_steps": 10,
        },
        {"name": "merged", "kind": "merge", "adapter": {"from": "tune"}},
        {
            "name": "ask",
            "kind": "inference",
            "model": {"from": "merged"},
            "prompts": QUESTIONS,
            "max_new_tokens": 64,
        },
    ]


def look(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """The allocation and NVML's processes once the runner computes; empty before."""
    job = answered(http.get(f"/jobs/{job_id}"))
    attempts = [each for each in job["attempts"] if each["phase"] == "running"]
    computing = {uuid: found for uuid, found in processes().items() if found}
    if not attempts or not computing:
        return {}
    return {"allocated": attempts[-1]["devices"], "computing": computing}


def processes() -> dict[str, list[str]]:
    """UUID of each GPU -> the processes that NVML says compute there, with their memory."""
    found = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        found[str(pynvml.nvmlDeviceGetUUID(handle))] = [
            f"pid {each.pid} {command_of(each.pid)} {(each.usedGpuMemory or 0) / 2**20:.0f} MiB"
            for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        ]
    return found


def command_of(pid: int) -> str:
    """The module that a process runs; a container may see another's numbers."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "(of another namespace)"
    return next((word for word in words if word.startswith("tuneyard.")), words[0])


def last_metrics(http: httpx.Client, job_id: str) -> str:
    """What the runner measured last: loss, tokens/s, memory."""
    lines = http.get(f"/jobs/{job_id}/metrics").text
    return f"last metrics: …{lines[-600:]}"


def report(jobs: Sequence[Mapping[str, Any]], seen: Mapping[str, Any]) -> int:
    """Print what happened; the exit code."""
    for job in jobs:
        for attempt in job["attempts"]:
            seconds = between(attempt["running_at"], attempt["ended_at"])
            print(f"{job['kind']:10} {job['state']:10} {seconds} s", *attempt["devices"])
            if attempt["cause"]:
                print(f"  {attempt['cause']}: {attempt['evidence']}")
    print(f"allocated: {seen.get('allocated')}\nNVML:      {seen.get('computing')}")
    there = set(seen.get("allocated", ())) == set(seen.get("computing", ())) != set()
    return 0 if there and all(job["state"] == "succeeded" for job in jobs) else 1


def between(begin: str | None, end: str | None) -> str:
    """Seconds from one timestamp to another."""
    if begin is None or end is None:
        return "?"
    return f"{(datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds():.1f}"


def answered(answer: httpx.Response) -> Any:
    """The body of an answer; exits with what the API says is wrong."""
    if answer.is_error:
        raise SystemExit(answer.text)
    return answer.json()


if __name__ == "__main__":
    sys.exit(main())
