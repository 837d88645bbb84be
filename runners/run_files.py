"""What a fine-tune leaves for people beside its weights, under LLaMA-Factory's names.

trainer_state.json                          as transformers reads it
train_results.json  eval_results.json       measures of the result; all_results.json has them all
predict_results.json                        of held-out rows that were answered
training_args.yaml                          the arguments that applied, to be submitted again
training_loss.png                           where plot_loss asks for it
reproduction.json                           what the weights follow from: see `tuneyard rerun`

There are no times in them: the same run writes the same bytes. When what happened stands in the
job's attempts and events, and its speed in its metrics.
"""

import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tuneyard.runners.asked import Asked, adapter_names
from tuneyard.runners.attempt import Attempt, library_versions
from tuneyard.runners.results import measures_files, write_texts
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.predicting import idle_settings
from tuneyard.specs.rewards import ONLINE
from tuneyard.specs.runner import REPRODUCTION_FILE
from tuneyard.specs.tuning import idle_fields
from tuneyard.store.folder import manifest_digest, read_manifest

if TYPE_CHECKING:
    from tuneyard.runners.training import Trainer

STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.yaml"
PLOT_FILE = "training_loss.png"
RUN_FILES = frozenset(
    {
        "trainer_log.jsonl", "train_results.json", "eval_results.json", STATE_FILE,
        "all_results.json", ARGUMENTS_FILE, PLOT_FILE, REPRODUCTION_FILE, "predict_results.json",
        "generated_predictions.jsonl", "watch_prompts.jsonl",
    }
)  # fmt: skip
"""They tell of one run, so nothing that is made of its model has them."""

Line = Mapping[str, Any]


def write_run_files(
    folder: Path,
    asked: Asked,
    attempt: Attempt,
    trainer: "Trainer",
    *,
    measured: Mapping[str, float],
) -> None:
    """Write all of them into the folder that becomes output/.

    measured: what the answers to held-out rows came to, as predict_… or eval_….
    """
    found = _results(trainer) | {"predict": {}}
    for name, value in measured.items():
        found[name.partition("_")[0]][name] = value
    write_texts(folder, measures_files(found))
    _write_json(folder / STATE_FILE, trainer_state(asked, trainer))
    _write_json(folder / REPRODUCTION_FILE, reproduction(asked, attempt, trainer.run["platform"]))
    arguments = yaml.safe_dump(effective_arguments(asked, attempt), allow_unicode=True)
    (folder / ARGUMENTS_FILE).write_text(arguments, encoding="utf-8")
    if asked.arguments.plot_loss:
        _plot(trainer.at.log, folder / PLOT_FILE, attempt)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _results(trainer: "Trainer") -> dict[str, dict[str, Any]]:
    """train and eval -> their measures: of the whole run, and of the model that is its result."""
    at, held_out = trainer.at, len(trainer.data.held_out)
    train = {
        "epoch": trainer.epoch,
        "num_input_tokens_seen": at.tokens,
        "train_loss": at.loss_sum / max(1, at.step),
        "train_samples": len(trainer.data.examples),
    }
    evaluations = (line for line in reversed(at.log) if "eval_loss" in line)
    kept = trainer.loaded_step
    measured: Line = next((e for e in evaluations if kept in (None, e["current_steps"])), {})
    evaluated = {name: value for name, value in measured.items() if name.startswith("eval_")}
    if evaluated:
        evaluated |= {"epoch": trainer.epoch, "eval_samples": held_out}
    return {"train": train, "eval": evaluated}


def trainer_state(asked: Asked, trainer: "Trainer") -> dict[str, Any]:
    """The run as transformers' TrainerState keeps it; its best checkpoint has no folder here."""
    at, plan, arguments = trainer.at, trainer.plan, asked.arguments
    return {
        "best_global_step": at.best_step,
        "best_metric": at.best_metric,
        "best_model_checkpoint": None,
        "epoch": trainer.epoch,
        "eval_steps": plan.eval_every,
        "global_step": at.step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [_logged(line) for line in at.log],
        "logging_steps": plan.log_every,
        "max_steps": plan.steps,
        "num_input_tokens_seen": at.tokens,
        "num_train_epochs": math.ceil(plan.steps / plan.steps_per_epoch),
        "save_steps": plan.save_every,
        "stateful_callbacks": {},
        "train_batch_size": arguments.per_device_train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }


def _logged(line: Line) -> dict[str, Any]:
    """A line of trainer_log.jsonl in transformers' words."""
    words = {
        "current_steps": "step",
        "lr": "learning_rate",
        "total_tokens": "num_input_tokens_seen",
    }
    left_out = ("total_steps", "percentage")
    return {words.get(name, name): value for name, value in line.items() if name not in left_out}


def effective_arguments(asked: Asked, attempt: Attempt) -> dict[str, Any]:
    """The arguments that applied, in LLaMA-Factory's words; inputs by id, as a submission says."""
    arguments, ids = asked.arguments, attempt.spec.input_ids
    every = set(FinetuneSpec.model_fields)
    full = FinetuneSpec.model_construct(every, **{name: getattr(arguments, name) for name in every})
    fields = every - {*idle_fields(full), *idle_settings(full), "adapter"}
    said = arguments.of_the_runner() | {"seed": asked.seed}
    if "lora_alpha" in fields:
        said["lora_alpha"] = arguments.alpha
    if arguments.stage in ONLINE:
        fields.add("temperature")
        said |= {"num_generations": arguments.generations, "beta": arguments.distance_weight}
        said["temperature"] = arguments.drawn_at
    inputs = {name: shown for name, shown in ids.items() if name in fields - {"model"}}
    if adapters := [ids[name] for name in adapter_names(ids)]:
        inputs["adapter_name_or_path"] = ",".join(adapters)
    applied = {name: _plain(said[name]) for name in said if name in fields}
    return {
        "model_name_or_path": asked.base_id,
        "do_train": True,
        **{name: value for name, value in applied.items() if value is not None},
        **inputs,
    }


def _plain(value: Any) -> Any:
    """500.0 as 500: what counts steps is written as people write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def reproduction(asked: Asked, attempt: Attempt, ran_on: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights follow from, so that another run can be held against this one."""
    spec = attempt.spec
    inputs = {
        name: {"id": shown, "sha256": spec.input_digests.get(name)}
        for name, shown in spec.input_ids.items()
        if name != "tokens"  # they follow from the others
    }
    inputs.setdefault("model", {"id": asked.base_id, "sha256": None})
    inputs["model"] = {**inputs["model"], **_origin(asked.model)}
    return {
        "format": 1,
        "inputs": inputs,
        "seed": asked.seed,
        "versions": {**library_versions(), "tuneyard": version("tuneyard")},
        "platform": {**ran_on, "processor": _processor(), "machine": platform.machine()},
    }


def _origin(model: Path) -> dict[str, Any]:
    """Where a base came from, as its manifest tells."""
    try:
        manifest = read_manifest(model)
    except FileNotFoundError:
        return {}
    known = {name: manifest[name] for name in ("source", "revision") if manifest.get(name)}
    return {"sha256": manifest_digest(manifest), **known}


def _processor() -> str:
    """The processor's name: other models may add in another order."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _plot(log: Sequence[Line], path: Path, attempt: Attempt) -> None:
    """Draw the losses; a picture that cannot be drawn is no reason to fail."""
    os.environ.setdefault("MPLCONFIGDIR", str(attempt.workdir / ".matplotlib"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = f"{path.name} needs matplotlib, which this node's runners lack."
        attempt.events.warn("plot_failed", message)
        return
    try:
        figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        _draw(figure.subplots(), log)
        figure.savefig(path)
    except Exception as error:
        path.unlink(missing_ok=True)
        attempt.events.warn("plot_failed", f"{path.name} could not be drawn: {error}.")


def _draw(axes: Any, log: Sequence[Line]) -> None:
    steps, losses = _curve(log, "loss")
    seen = "o" if len(steps) == 1 else None  # a line of one point is none
    axes.plot(steps, losses, color="#1f77b4", alpha=0.4, marker=seen, label="loss")
    axes.plot(steps, smoothed(losses), color="#1f77b4", label="loss, smoothed")
    steps, losses = _curve(log, "eval_loss")
    if steps:
        axes.plot(steps, losses, color="#d62728", marker="o", markersize=3, label="eval loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _curve(log: Iterable[Line], name: str) -> tuple[list[int], list[float]]:
    found = [(line["current_steps"], line[name]) for line in log if name in line]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean whose memory grows with the run, as LLaMA-Factory draws it.

    >>> smoothed([2.0, 1.0, 1.0])[0], smoothed([])
    (2.0, [])
    """
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    means: list[float] = []
    for value in values:
        means.append(weight * means[-1] + (1 - weight) * value if means else value)
    return means
