"""Checkpoints: everything that a run needs to go on as if nothing had happened. No pickle.

adapter_model.safetensors  adapter_config.json    the adapter, in peft's format
trained.safetensors                               what learned, where that is not all of it
allocation.safetensors                            what adalora knows of its ranks
optimizer.safetensors                             what the optimizer remembers of each parameter
random.safetensors                                states of torch's generators
state.json                                        where the run is, and what it ran on
trainer_log.jsonl                                 the log up to here
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tuneyard.runners.allocation import RankAllocation
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.learned import restore_learned, save_learned
from tuneyard.runners.losses import RunningMean
from tuneyard.runners.mover import Mover
from tuneyard.runners.retention import checkpoint_meta
from tuneyard.runners.window import Window
from tuneyard.specs.runner import CHECKPOINTS
from tuneyard.store.folder import manifest_digest, publish_folder, verify_folder

OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_FILE = "state.json"
LOG_FILE = "trainer_log.jsonl"


@dataclass
class Position:
    """Where a run is. ``examples`` were consumed, ``tokens`` seen, in ``step`` whole steps."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    evaluated_step: int = -1
    eval_loss: float | None = None  # of evaluated_step
    eval_metric: float | None = None  # the same: what evaluations are compared by
    best_loss: float | None = None  # of the evaluation that was best
    best_step: int | None = None
    best_metric: float | None = None  # what was compared: the loss, or what was asked for
    compared_by: str = ""  # what it was measured by: another measure's values mean nothing
    bad_evaluations: int = 0  # in a row that were no better
    schedule: dict[str, Any] = field(default_factory=dict)  # of one that goes by evaluations
    loss_sum: float = 0.0
    window: Window = field(default_factory=Window)
    skipped_steps: int = 0
    baseline: RunningMean = field(default_factory=RunningMean)
    log: list[dict[str, Any]] = field(default_factory=list)
    watched_step: int = -1
    answers: list[dict[str, Any]] = field(default_factory=list)  # to watch-prompts, so far


@dataclass(frozen=True)
class Running:
    """The parts of a run that change with every step.

    cast_to: what products are computed in where it is not the weights' own format.
    """

    model: Any
    mover: Mover
    scaler: torch.amp.GradScaler
    device: str
    cast_to: torch.dtype | None = None
    allocation: RankAllocation | None = None

    def casting(self) -> torch.autocast:
        """The context in which the model computes."""
        on = self.cast_to is not None
        return torch.autocast(self.device, self.cast_to or torch.float16, enabled=on)


RandomState = Mapping[str, torch.Tensor]


def random_state(device: str) -> RandomState:
    """The states of the generators that dropout and noise draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write_checkpoint(
    workdir: Path,
    running: Running,
    *,
    position: Position,
    random: RandomState,
    run: Mapping[str, Any],
    base_id: str,
    greater: bool = False,
) -> tuple[str, str]:
    """Publish checkpoints/step-N; returns its path within WORKDIR and its manifest's digest.

    run: what a resumed run must agree with, and what it ran on. greater: whether more of what
    evaluations are compared by is better.
    """
    name = f"{CHECKPOINTS}/step-{position.step}"
    aside = workdir / CHECKPOINTS / f".aside-{position.step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_learned(running.model, aside, base_id=base_id)
        running.mover.save(aside / OPTIMIZER_FILE)
        save_file(dict(random), aside / RANDOM_FILE)
        _write_state(aside, running, position, run)
        manifest = publish_folder(aside, workdir / name, _meta(position, greater))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # gives its space back to a full disk
        raise
    return name, manifest_digest(manifest)


def _meta(position: Position, greater: bool) -> dict[str, Any]:
    best = position.best_step
    if position.evaluated_step != position.step or position.eval_metric is None:
        return checkpoint_meta(position.step, best_step=best)
    rank = -position.eval_metric if greater else position.eval_metric
    return checkpoint_meta(position.step, position.eval_loss, rank, best)


def _write_state(aside: Path, running: Running, position: Position, run: Mapping[str, Any]) -> None:
    state = asdict(position)
    write_log(aside / LOG_FILE, state.pop("log"))
    state |= {"run": dict(run), "scaler": running.scaler.state_dict()}
    text = json.dumps(state, indent=1, sort_keys=True)
    (aside / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def write_log(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a training log as JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_checkpoint(
    folder: Path, running: Running, *, run: Mapping[str, Any], steps: int | None = None
) -> Position:
    """Bring a run of so many steps to where a checkpoint was; verified first, file by file.

    Raises: FolderDamaged, BadSpec when the checkpoint belongs to another run.
    """
    verify_folder(folder)
    state = _read_state(folder)
    _compare(state.pop("run"), run)
    if steps is not None and state["step"] > steps:
        message = (
            f"The checkpoint is at step {state['step']}, beyond the {steps} steps of this run."
        )
        raise BadSpec(message, field="resume", hint="ask for more steps, or start from scratch")
    running.mover.check(folder / OPTIMIZER_FILE)  # before anything is changed
    with running.mover.whole():
        restore_learned(running.model, folder)
    running.mover.restore(folder / OPTIMIZER_FILE)
    _restore_random(load_file(folder / RANDOM_FILE), running.device)
    if scaler := state.pop("scaler"):
        running.scaler.load_state_dict(scaler)
    state["baseline"] = RunningMean(**state.get("baseline", {}))
    state["window"] = Window(**state.get("window", {}))
    log = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return Position(**state, log=[json.loads(line) for line in log])


def differences(folder: Path, run: Mapping[str, Any]) -> list[str]:
    """What a checkpoint ran on that is otherwise here: then equal bits are not promised."""
    before, now = _read_state(folder)["run"]["platform"], run["platform"]
    return [
        f"{key}: {before.get(key)} then, {now[key]} now"
        for key in now
        if before.get(key) != now[key]
    ]


def job_of(folder: Path) -> str | None:
    """Which job wrote a checkpoint; None where that was not written down yet."""
    job: str | None = _read_state(folder)["run"].get("job")
    return job


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


def _compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in ("examples", "data", "seed"):
        if before[key] != now[key]:
            raise BadSpec(
                f"The checkpoint was made with other data: {key} was {before[key]}, is {now[key]}.",
                field="resume",
                hint="keep dataset, template, cutoff_len and seed, or start from scratch",
            )


def _restore_random(states: Mapping[str, torch.Tensor], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if device == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
