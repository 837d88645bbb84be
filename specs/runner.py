"""The runner's protocol: what a worker hands to a runner, and what the runner writes back.

    python -P -m tuneyard.runners.KIND SPEC.json WORKDIR

docs/runner-protocol.md is the page for people who write a runner of their own.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_LINE_BYTES = 64 * 1024
"""An event is one write() of one line of at most this many bytes."""

SPEC_FILE = "spec.json"
EVENTS_FILE = "events.jsonl"
LOG_FILE = "log"
GUARD_FILE = "guard.json"
GUARD_SOCKET = "guard.sock"
EXIT_FILE = "exit.json"
SERVE_SOCKET = "serve.sock"
CHECKPOINTS = "checkpoints"
OUTPUT = "output"
INPUTS = "inputs"
REPORTS = "reports"  # what trackers wrote, beside the output
REPRODUCTION_FILE = "reproduction.json"  # in what a fine-tune leaves: what it follows from
TUNEYARD_FILE = "tuneyard.json"  # in an adapter: what it needs to speak

KEPT_CHECKPOINTS = 2
"""So many of the newest checkpoints stay beside the best, where save_total_limit is not set."""

ATTEMPT_MARK = "TUNEYARD_ATTEMPT"
"""Environment variable that every process of an attempt bears; the value is the attempt's id."""


TRACKER_FILE = "TUNEYARD_TRACKER_FILE"
"""Environment variable that names a file of variables for trackers: {"WANDB_API_KEY": …}."""


class RunnerSpec(BaseModel):
    """What a runner is asked to do; WORKDIR/spec.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: Literal[1] = 1
    job: str = "job_by_hand"
    attempt: int = 1
    kind: str
    seed: int = 42
    device: Literal["cpu", "gpu"] = "cpu"
    resume: str | None = None  # folder of a whole checkpoint to go on from
    inputs: dict[str, str] = {}  # name (model, adapter, dataset, prompts, …) -> local path
    input_ids: dict[str, str] = {}  # the same names -> id or digest, for manifests
    input_digests: dict[str, str] = {}  # the same names -> sha256 of the file or of the manifest
    arguments: dict[str, Any] = {}  # the job's own arguments, checked and complete


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    v: Literal[1] = 1
    n: int  # 1, 2, 3… within one runner's process
    t_mono: float  # seconds on the runner's monotonic clock


class Started(_Event):
    """The runner's process is up."""

    type: Literal["started"] = "started"
    pid: int
    versions: dict[str, str] = {}


class Phase(_Event):
    """The attempt moved on: loading, running."""

    type: Literal["phase"] = "phase"
    phase: Literal["loading", "running"]


class Progress(_Event):
    """How far the work is."""

    type: Literal["progress"] = "progress"
    done: int
    total: int | None = None
    unit: str = "steps"
    eta_s: float | None = None


class Metric(_Event):
    """Values measured at a step."""

    type: Literal["metric"] = "metric"
    step: int
    values: dict[str, float]


class Checkpoint(_Event):
    """A whole checkpoint stands at ``path`` (relative to WORKDIR)."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    manifest_sha256: str


class Sample(_Event):
    """Something the model said at a step."""

    type: Literal["sample"] = "sample"
    step: int | None = None
    prompt: str = ""
    text: str = ""


class Warned(_Event):
    """Something a person should know, though the work goes on."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class Result(_Event):
    """The work is done; WORKDIR/output is whole."""

    type: Literal["result"] = "result"
    values: dict[str, Any] = {}


class Failed(_Event):
    """Why the runner is about to end without a result."""

    type: Literal["failed"] = "failed"
    cause: str
    evidence: str = ""
    patch: dict[str, Any] = {}  # arguments that would help, if any


RunnerEvent = Annotated[
    Started | Phase | Progress | Metric | Checkpoint | Sample | Warned | Result | Failed,
    Field(discriminator="type"),
]
