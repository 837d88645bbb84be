"""The other side of compare_llamafactory.py: runs in LLaMA-Factory's own environment.

    python -P bench/llamafactory_side.py tokens|train WORK.json RESULT.json

WORK.json: {"runs": [arguments of LLaMA-Factory, …], "rows": 200}. tokens: what it makes of the
first rows of each run's data set. train: one run; its losses, and when each step began and ended.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import llamafactory.cli  # noqa: F401 - as its command does, so that start-up is its own
from transformers import TrainerCallback


def main(what: str, work: Path, result: Path) -> None:
    """Do the work; what a run prints goes to stderr."""
    asked = json.loads(work.read_text())
    done = train(asked["runs"][0]) if what == "train" else tokens(asked["runs"], asked["rows"])
    result.write_text(json.dumps(done))


def tokens(runs: list[dict[str, Any]], rows: int) -> list[list[dict[str, Any]]]:
    """For each run the columns of its first rows, without those of images."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    found = []
    for run in runs:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(run)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        template.mm_plugin = get_mm_plugin("base")  # rows of text need no image processor
        stage = "rm" if finetuning_args.stage == "dpo" else finetuning_args.stage
        data = get_dataset(template, model_args, data_args, training_args, stage=stage, **module)
        train_set = data["train_dataset"]
        kept = [name for name in train_set.column_names if "ids" in name or "label" in name]
        kept += [name for name in train_set.column_names if name == "kto_tags"]
        count = min(rows, len(train_set))
        found.append([{name: train_set[i][name] for name in kept} for i in range(count)])
    return found


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when steps begin and end, and the losses that are logged."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.monotonic())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append({k: float(v) for k, v in logs.items()})


def train(run: dict[str, Any]) -> dict[str, Any]:
    """One run, to its end."""
    from llamafactory.train.tuner import run_exp

    clock = Clock()
    run_exp(args=run, callbacks=[clock])
    return {"logs": clock.logs, "began": clock.began, "ended": clock.ended}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
