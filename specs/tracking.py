"""Where a fine-tune reports what it measures, and whether its losses are drawn."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import Name, Spec, Words, refusal
from tuneyard.specs.problems import nearest, problem

TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
"""Programs that runs can be reported to, each where its package is there."""

ELSEWHERE = frozenset(
    {"azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "neptune"}
)
"""Those that transformers knows besides."""


def _known(value: str | list[str]) -> str | list[str]:
    for name in _names(value):
        if name in ELSEWHERE:
            hint = f"one of: {', '.join(TRACKERS)}"
            raise refusal("not_supported_yet", f"names {name}, which is not supported yet", hint)
        if name not in {"none", "all", *TRACKERS}:
            near = nearest(name, ["none", "all", *TRACKERS])
            hint = f"did you mean {near}?" if near else f"none, all, or {', '.join(TRACKERS)}"
            raise refusal("bad_choice", f"names {name[:60]!r}, which is no tracker", hint)
    return value


def _names(value: str | list[str]) -> list[str]:
    """A list, or a text that parts them by commas."""
    given = value.split(",") if isinstance(value, str) else value
    return [name.strip() for name in given if name.strip()]


Reporters = Annotated[Words, AfterValidator(_known)]


class TrackingFields(Spec):
    """What a fine-tune says of those who follow it."""

    plot_loss: bool = Field(False, description="Draw training_loss.png.")
    report_to: Reporters = Field(
        "none",
        description=f"Trackers: none, all (that the node has), or of {', '.join(TRACKERS)}.",
    )
    run_name: Name | None = Field(None, description="The run's name there; unset: the job's id.")
    project: Name = Field("huggingface", description="Its project, or experiment, there.")
    use_swanlab: bool = Field(False, description="Report to swanlab, too.")
    swanlab_project: Name = Field("llamafactory", description="Its project in swanlab.")
    swanlab_workspace: Name | None = Field(None, description="Whose project that is in swanlab.")
    swanlab_run_name: Name | None = Field(None, description="Its name there; unset: run_name.")
    swanlab_mode: Literal["cloud", "local"] = Field(
        "cloud", description="local: in the job's reports alone."
    )


def trackers_of(report_to: str | list[str], use_swanlab: bool) -> tuple[list[str], bool]:
    """Whom a run is to be reported to; also whether they were named one by one.

    >>> trackers_of("wandb, tensorboard", False), trackers_of("none", True)
    ((['tensorboard', 'wandb'], True), (['swanlab'], True))
    """
    names = set(_names(report_to))
    if "all" in names:
        return list(TRACKERS), False
    wanted = names | {"swanlab"} if use_swanlab else names
    return [name for name in TRACKERS if name in wanted], True


def tracking_clashes(spec: TrackingFields) -> Iterator[InputError]:
    """None beside a tracker."""
    names = set(_names(spec.report_to))
    if "none" in names and len(names) > 1:
        message = "report_to names none and others."
        yield problem("conflicting_fields", message, "report_to", "leave none out")
