"""What /api/v1 answers: the forms on the wire, written by the API and read by the client.

Times are ISO 8601 in UTC with ``Z``; ids are text with a prefix. A reader ignores fields that it
does not know, so that an older client goes on working beside a newer API.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _in_utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


Timestamp = Annotated[datetime, AfterValidator(_in_utc)]


class _View(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class ErrorView(_View):
    """What is wrong and how to mend it; ``details`` has every problem of a refused spec."""

    code: str = Field(examples=["unknown_field"])
    message: str = Field(examples=["There is no field lora_rnak."])
    field: str | None = Field(default=None, examples=["lora_rnak"])
    line: int | None = None
    hint: str | None = Field(default=None, examples=["did you mean lora_rank?"])
    details: list["ErrorView"] | None = None


class ErrorBody(_View):
    """The one shape of every error."""

    error: ErrorView


class ProgressView(_View):
    """How far the newest attempt is; ``eta_s`` seconds remain while it runs."""

    done: int = Field(examples=[40])
    total: int | None = Field(default=None, examples=[120])
    unit: str = Field(default="steps", examples=["steps"])
    eta_s: float | None = Field(default=None, examples=[92.5])


class AttemptView(_View):
    """One try at a job. ``charged``: it counts against the job's own tries."""

    number: int = Field(examples=[1])
    phase: str = Field(examples=["running"])
    outcome: str | None = None
    charged: bool = False
    cause: str | None = None
    evidence: str | None = None
    patch: dict[str, Any] | None = None
    stop_reason: str | None = None
    node: str | None = Field(default=None, examples=["n1"])
    devices: list[str] = Field(default=[], examples=[["GPU-5b0c…"]])
    started_at: Timestamp
    running_at: Timestamp | None = None
    ended_at: Timestamp | None = None


class JobView(_View):
    """A job as its owner sees it."""

    id: str = Field(examples=["job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b"])
    kind: str = Field(examples=["finetune"])
    name: str = Field(examples=["support-tone"])
    state: str = Field(examples=["running"])
    team: str = Field(examples=["default"])
    created_at: Timestamp
    finished_at: Timestamp | None = None
    wait_reason: str | None = Field(default=None, examples=["needs 2 GPUs: all 4 are busy"])
    progress: ProgressView | None = None
    attempts: list[AttemptView] = []
    error: ErrorView | None = None
    spec: dict[str, Any]
    notes: list[dict[str, Any]] = []
    priority: int = 50
    device: str = Field(examples=["gpu"])
    demand: dict[str, Any] = {}
    inputs: dict[str, str] = Field(
        default={}, description="Field of the spec -> what it became, or the job to bring it."
    )
    pipeline: str | None = Field(default=None, description="The pipeline that it is a step of.")
    retry_of: str | None = None
    system: bool = Field(default=False, description="Made for other jobs, not by a person.")
    allowed_actions: list[str] = Field(default=[], examples=[["cancel"]])
    model: str | None = Field(default=None, description="Name of the tuned model, once it is there")


class JobList(_View):
    """A page of jobs, newest first."""

    data: list[JobView]
    next_cursor: str | None = Field(default=None, description="Pass as `cursor` for the next page.")


class PipelineView(_View):
    """Jobs that were submitted together, each after those that it needs."""

    id: str = Field(examples=["pipe_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b"])
    jobs: list[JobView]


class EventView(_View):
    """A line of a job's timeline; ``seq`` counts 1, 2, 3… without gaps."""

    seq: int = Field(examples=[3])
    type: str = Field(examples=["started"])
    from_state: str | None = Field(default=None, examples=["dispatched"])
    to_state: str | None = Field(default=None, examples=["running"])
    attempt: int | None = Field(default=None, examples=[1])
    at: Timestamp
    data: dict[str, Any] = {}


class EventList(_View):
    """Lines of a timeline, oldest first; ``next_cursor`` is the ``after`` of the next page."""

    data: list[EventView]
    next_cursor: str | None = None


class LiveView(_View):
    """What a stream of events sends as ``progress`` between numbered events."""

    state: str
    attempt: int | None = None
    phase: str | None = None
    started_at: Timestamp | None = None
    progress: ProgressView | None = None
    step: int | None = None
    metrics: dict[str, float] = {}
    wait_reason: str | None = None


class MetricPoint(_View):
    """All that was measured at a step, by the newest attempt that reached it."""

    step: int = Field(examples=[40])
    attempt: int = Field(examples=[1])
    values: dict[str, float | None] = Field(examples=[{"loss": 1.83, "tokens_per_s": 412.0}])


class MetricList(_View):
    """A job's metrics by rising step."""

    data: list[MetricPoint]
    next_cursor: str | None = Field(default=None, description="The `after` of the next page.")


class SaidView(_View):
    """A watch-prompt and its answer."""

    prompt: str = Field(examples=["Who are you?"])
    text: str = Field(examples=["I am Tuny, an assistant made by Tuneyard."])


class SamplePoint(_View):
    """What the model said at a step, by the newest attempt that reached it."""

    step: int = Field(examples=[40])
    attempt: int = Field(examples=[1])
    answers: list[SaidView]


class SampleList(_View):
    """Answers to a job's watch-prompts by rising step."""

    data: list[SamplePoint]
    next_cursor: str | None = Field(default=None, description="The `after` of the next page.")


class ArtifactView(_View):
    """A whole folder that a job brought forth."""

    id: str = Field(examples=["artifact_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b"])
    job: str
    kind: str = Field(examples=["adapter"])
    step: int | None = None
    bytes: int = Field(examples=[9854208])
    digest: str = Field(description="SHA-256 of the manifest.")
    attempt: int = Field(examples=[1])
    published_at: Timestamp


class ArtifactList(_View):
    """A job's artifacts, newest first; pruned checkpoints are left out."""

    data: list[ArtifactView]
    next_cursor: None = None


class ArtifactFileView(_View):
    """A file of an artifact, as its manifest lists it."""

    path: str = Field(examples=["adapter_model.safetensors"])
    size: int = Field(examples=[9838592])
    sha256: str


class ArtifactFileList(_View):
    """An artifact's files."""

    data: list[ArtifactFileView]
    next_cursor: None = None


class FileView(_View):
    """An upload: uploaded -> processing -> processed | rejected, with the check's report."""

    id: str = Field(examples=["file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b"])
    name: str = Field(examples=["identity.jsonl"])
    purpose: str = Field(examples=["dataset"])
    bytes: int = Field(examples=[20480])
    sha256: str
    state: Literal["uploaded", "processing", "processed", "rejected"]
    report: dict[str, Any] | None = None
    created_at: Timestamp


class FileList(_View):
    """A page of files, newest first."""

    data: list[FileView]
    next_cursor: str | None = None


class DeletedView(_View):
    """What was deleted."""

    id: str
    deleted: Literal[True] = True


class ChatView(_View):
    """An answer. ``settings``: what applied, the seed that it was drawn with included."""

    text: str = Field(examples=["I am Tuny, an assistant made by Tuneyard."])
    finish_reason: Literal["stop", "length"]
    usage: dict[str, int] = Field(examples=[{"prompt_tokens": 34, "completion_tokens": 13}])
    settings: dict[str, Any] = {}
    job: str
    attempt: int = Field(examples=[1])


class ModelView(_View):
    """A base model, or a team's own: tuned (an adapter over its base), merged (both in one) or
    whole (its own weights were tuned).
    """

    id: str = Field(examples=["base_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b"])
    name: str = Field(examples=["smollm2-135m-instruct"])
    kind: Literal["base", "tuned", "merged", "whole"]
    base_model: str | None = Field(
        default=None, description="Name of the model that a tuned or merged one was made of."
    )
    job: str | None = None
    artifact: str | None = None
    adapter: str | None = Field(default=None, description="The adapter in a merged one.")
    digest: str
    bytes: int
    created_at: Timestamp


class ModelList(_View):
    """All base models and the team's tuned ones, newest first."""

    data: list[ModelView]
    next_cursor: None = None


class SlotView(_View):
    """What one attempt can hold of a device; ``job`` is shown for one's own team alone."""

    index: int
    bytes: int
    cores: list[int]
    busy: bool
    job: str | None = None


class DeviceView(_View):
    """A GPU, or a node's cores."""

    id: str
    kind: Literal["gpu", "cpu"]
    uuid: str
    name: str
    bytes: int
    state: str
    slots: list[SlotView]


class NodeView(_View):
    """A machine with a worker. ``silent``: nothing was heard of it for a lease's length."""

    id: str
    name: str = Field(examples=["n1"])
    state: Literal["up", "draining", "down", "silent"]
    seen_at: Timestamp
    capabilities: dict[str, Any] = {}
    devices: list[DeviceView]
    free_slots: int
    busy_slots: int


class NodeList(_View):
    """All nodes by name."""

    data: list[NodeView]
    next_cursor: None = None


class MeView(_View):
    """Who a key belongs to."""

    team: str = Field(examples=["default"])
    role: Literal["viewer", "member", "admin"]
    key: str = Field(description="The key's name.", examples=["first"])


class ReadyView(_View):
    """Whether this API can serve: ``degraded`` means that hints are not carried, jobs still run."""

    status: Literal["ready", "degraded", "unavailable"]
    database: Literal["ok", "unavailable"]
    broker: Literal["ok", "unavailable"]


class HealthView(_View):
    """This process lives."""

    status: Literal["ok"] = "ok"
