"""Report one run to one tracker:  python -P -m tuneyard.runners.tracker TRACKING.json

A process of its own, started by runners/tracking.py: whatever a tracker's package does, hang and
crash included, the run goes on. It reads what the runner writes to events.jsonl, and needs no word
from it; when its stdin ends, the run does. What the package writes goes below the folder in which
this process stands. Exit 0: all was handed over; otherwise FAILED_FILE says why.
"""

import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from tuneyard.runners.window import Window

FAILED_FILE, NOTES_FILE = "failed.txt", "notes.txt"
"""Beside TRACKING.json: why it failed, and sentences for the job's owner."""

LOOK_EVERY_S = 0.2

QUIET = {
    # Their makers' own counting and error reports: nobody asked for them.
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    # A folder is what fits into an artifact; mlflow warns of it since it prefers databases.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}

Values = Mapping[str, float]


class Tracking(BaseModel):
    """What a tracker's process is told.

    total, every: the run's steps, and those between two that are reported. events: the runner's
    file, from offset on. history: the log up to the checkpoint that the run goes on from. window:
    the steps since its last line.
    variables: a file of names and values that the worker hands on.
    """

    model_config = ConfigDict(frozen=True)

    tracker: str
    name: str
    project: str
    workspace: str | None = None
    local: bool = False
    job: str
    arguments: dict[str, Any]
    total: int
    every: int
    events: str
    offset: int = 0
    history: list[dict[str, float]] = []
    window: Window = Window()
    variables: str | None = None


class Tracker(Protocol):
    """What is done with a run's values."""

    def log(self, step: int, values: Values) -> None:
        """Keep or send what was measured at a step."""

    def finish(self) -> None:
        """Hand over the rest."""


def main(path: Path) -> int:
    """Report until stdin ends, then finish."""
    tracking = Tracking.model_validate_json(path.read_bytes())
    os.nice(5)  # the training goes first
    os.environ.update(QUIET | variables_of(tracking.variables))
    try:
        tracker = TRACKERS[tracking.tracker](tracking)
        for step, values in _measured(tracking):
            tracker.log(step, values)
        tracker.finish()
    except BaseException as error:  # packages have been seen to raise SystemExit
        said = f"{type(error).__name__}: {error}".strip()
        for secret in secrets_of(tracking.variables):
            said = said.replace(secret, "…")
        path.with_name(FAILED_FILE).write_text(said[:400], encoding="utf-8")
        return 1
    return 0


def variables_of(file: str | None) -> dict[str, str]:
    """What the worker hands on."""
    return dict(json.loads(Path(file).read_bytes())) if file else {}


def secrets_of(file: str | None) -> list[str]:
    """Values that are nobody's business, by their names."""
    parts = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    found = variables_of(file).items()
    return [value for name, value in found if value and any(part in name for part in parts)]


def _measured(tracking: Tracking) -> Iterator[tuple[int, Values]]:
    """Step and values that are due, from the checkpoint's log on to the end of the run."""
    last, window = -1, tracking.window
    for line in tracking.history:
        last = int(line["current_steps"])
        yield last, {name: line[name] for name in line if name not in NOT_MEASURED}
    for event in _events(Path(tracking.events), tracking.offset):
        if event["type"] != "metric" or event["step"] <= last:
            continue
        values = event["values"]
        if "loss" in values:
            window.take({n: v for n, v in values.items() if n not in OF_A_STEP and v is not None})
        if _is_due(tracking, event):
            yield event["step"], values | (window.means() if "loss" in values else {})


OF_A_STEP = {"lr", "grad_norm", "epoch", "tokens", "tokens_per_s", "gpu_bytes", "rss_bytes"}
"""What is reported as it is; of the rest the mean since the last report."""

NOT_MEASURED = {"current_steps", "total_steps", "total_tokens", "percentage"}


def _is_due(tracking: Tracking, event: Mapping[str, Any]) -> bool:
    """As often as the log is written; and what is measured on held-out rows always."""
    step = event["step"]
    measured = any(name.startswith("eval_") for name in event["values"])
    return measured or step == tracking.total or step % tracking.every == 0


def _events(path: Path, offset: int) -> Iterator[dict[str, Any]]:
    """Whole lines as they are written; ends with what was written before stdin ended."""
    rest = b""
    with path.open("rb") as file:
        file.seek(offset)
        while True:
            ended = bool(select.select([sys.stdin], [], [], LOOK_EVERY_S)[0])
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                yield json.loads(line)
            if ended:
                return


def shown(values: Values) -> dict[str, float]:
    """As transformers names them: train/loss, train/learning_rate, eval/loss.

    >>> shown({"loss": 2.0, "lr": 0.1, "eval_loss": 3.0})
    {'train/loss': 2.0, 'train/learning_rate': 0.1, 'eval/loss': 3.0}
    """
    return {
        f"eval/{name.removeprefix('eval_')}"
        if name.startswith("eval_")
        else f"train/{'learning_rate' if name == 'lr' else name}": value
        for name, value in values.items()
    }


def _note(text: str) -> None:
    """Leave a sentence for the job's owner."""
    with Path("..", NOTES_FILE).open("a", encoding="utf-8") as file:
        file.write(text + "\n")


class Tensorboard:
    """Event files, by tensorboard's own writer: torch need not be imported for them."""

    def __init__(self, tracking: Tracking) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(Path("runs", tracking.name.replace("/", "_"))))

    def log(self, step: int, values: Values) -> None:
        """Add a point to each curve."""
        points = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in shown(values).items()
        ]
        summary = self._summary(value=points)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def finish(self) -> None:
        """Write the rest."""
        self._writer.close()


class Wandb:
    """Weights & Biases; without a key the run is kept in its folder, for `wandb sync`."""

    def __init__(self, tracking: Tracking) -> None:
        import wandb

        if "WANDB_API_KEY" not in os.environ and "WANDB_MODE" not in os.environ:
            os.environ["WANDB_MODE"] = "offline"
            _note("wandb has no WANDB_API_KEY here: the run is kept for `wandb sync`.")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or tracking.project,
            name=tracking.name,
            id=tracking.job,
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
            dir=str(Path.cwd()),
            config=tracking.arguments,
            settings=wandb.Settings(disable_git=True, save_code=False),
        )

    def log(self, step: int, values: Values) -> None:
        """Send a row of the run's history."""
        self._run.log({**shown(values), "train/global_step": step}, step=step)

    def finish(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class Mlflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else a folder mlruns."""

    def __init__(self, tracking: Tracking) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._run = self._find_run(tracking) or self._new_run(tracking, Param)

    def _find_run(self, tracking: Tracking) -> str | None:
        """The run that an earlier attempt of the job began."""
        experiment = self._client.get_experiment_by_name(_experiment(tracking))
        if experiment is None:
            return None
        by = f"tags.`tuneyard.job` = '{tracking.job}'"
        runs = self._client.search_runs([experiment.experiment_id], by, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _new_run(self, tracking: Tracking, param: Callable[[str, str], Any]) -> str:
        name = _experiment(tracking)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else None
        run = self._client.create_run(
            experiment_id or self._client.create_experiment(name),
            run_name=os.environ.get("MLFLOW_RUN_NAME") or tracking.name,
            tags={"tuneyard.job": tracking.job},
        )
        params = [param(name, str(value)[:500]) for name, value in tracking.arguments.items()]
        for start in range(0, len(params), 100):  # a request takes so many
            self._client.log_batch(run.info.run_id, params=params[start : start + 100])
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow takes no folder for a run's in which that of artifacts is missing, and an
            # artifact of ours has no empty folders.
            self._client.log_dict(run.info.run_id, tracking.arguments, "arguments.json")
        return str(run.info.run_id)

    def log(self, step: int, values: Values) -> None:
        """Send the values of a step, under their names in the log."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric("learning_rate" if name == "lr" else name, value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._run)


def _experiment(tracking: Tracking) -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or tracking.project


class Swanlab:
    """SwanLab; without a key the run is kept in its folder, for `swanlab sync`."""

    def __init__(self, tracking: Tracking) -> None:
        import swanlab

        mode = "offline" if tracking.local else "online"
        if mode == "online" and "SWANLAB_API_KEY" not in os.environ:
            mode = "offline"
            _note("swanlab has no SWANLAB_API_KEY here: the run is kept for `swanlab sync`.")
        else:
            mode = os.environ.get("SWANLAB_MODE") or mode
        self._swanlab = swanlab
        swanlab.init(
            project=tracking.project,
            workspace=tracking.workspace,
            name=tracking.name,
            mode=mode,
            log_dir=str(Path("swanlog").absolute()),
            config=tracking.arguments,
            tags=[tracking.job],
        )

    def log(self, step: int, values: Values) -> None:
        """Send the values of a step."""
        self._swanlab.log(shown(values), step=step)

    def finish(self) -> None:
        """Wait until all is sent."""
        self._swanlab.finish()


class Trackio:
    """Trackio: a database in a folder."""

    def __init__(self, tracking: Tracking) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(Path("trackio").absolute()))
        import trackio

        self._trackio = trackio
        trackio.init(
            project=tracking.project,
            name=tracking.name,
            config=tracking.arguments,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Values) -> None:
        """Add the values of a step."""
        self._trackio.log(shown(values), step=step)

    def finish(self) -> None:
        """Write the rest."""
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[Tracking], Tracker]] = {
    "tensorboard": Tensorboard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "swanlab": Swanlab,
    "trackio": Trackio,
}


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no package's own end of the process is waited for
