"""How long a fine-tune takes to its first step, beside what it cannot do without.

    python -P bench/runner_start.py MODEL_FOLDER DATASET [--rounds 3]

Cannot do without: a process that imports torch, the model's class and peft, and loads the weights.
Prints both in seconds, the best of the rounds, and their ratio; the bound is 1.3.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEAST = """
import json, os, sys
import torch
import transformers
from peft import LoraConfig, get_peft_model
folder = sys.argv[1]
name = json.load(open(folder + "/config.json"))["architectures"][0]
getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
os._exit(0)  # the runner is not measured to its end either
"""


def main() -> int:
    """Measure in turn, so that a busy machine disturbs both alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    least, runner = [], []
    for _ in range(asked.rounds):
        least.append(seconds([sys.executable, "-P", "-c", LEAST, str(asked.model)]))
        runner.append(to_first_step(asked.model, asked.dataset))
    print(f"imports and weights   {min(least):.2f} s   ({shown(least)})")
    print(f"runner to first step  {min(runner):.2f} s   ({shown(runner)})")
    print(f"ratio                 {min(runner) / min(least):.2f}")
    return 0 if min(runner) <= 1.3 * min(least) else 1


def shown(times: list[float]) -> str:
    """All rounds, in order."""
    return " ".join(f"{each:.2f}" for each in times)


def seconds(argv: list[str]) -> float:
    """Wall time of a process."""
    began = time.monotonic()
    subprocess.run(argv, check=True, env=environment(), stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def to_first_step(model: Path, dataset: Path) -> float:
    """From starting the runner's process to the event that its first step begins after."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "spec.json")
        inputs = {"model": str(model.absolute()), "dataset": str(dataset.absolute())}
        arguments = {
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "cutoff_len": 96,
            "bf16": True,
        }
        spec.write_text(json.dumps({"kind": "finetune", "inputs": inputs, "arguments": arguments}))
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-P", "-m", "tuneyard.runners.finetune", str(spec), folder],
            check=True,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        events = [
            json.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()
        ]
    # The first progress event (0 steps done) is written when the first step begins. Both clocks
    # are CLOCK_MONOTONIC of one machine.
    first = next(e for e in events if e["type"] == "progress" and e["unit"] == "steps")
    return float(first["t_mono"]) - began


def environment() -> dict[str, str]:
    """One thread, no network."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
