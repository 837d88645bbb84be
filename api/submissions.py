"""What a submission passes on its way to a row: the data's reports and the base's headers."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from tuneyard.api.access import Yard
from tuneyard.checks.hubs import check_place
from tuneyard.checks.submission import (
    check_evaluate,
    check_finetune,
    check_inference,
    check_prompts,
    check_serve,
)
from tuneyard.models import files
from tuneyard.models.inputs import Inputs
from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.evaluate import EvaluateSpec
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.specs.jobs import JobSpec
from tuneyard.specs.serve import ServeSpec


def check_inputs(tx: Connection, yard: Yard, spec: JobSpec, inputs: Inputs) -> None:
    """Refuse what the inputs that are there already rule out. Raises: SpecRejected."""
    problems: list[InputError] = []
    if isinstance(spec, FinetuneSpec):
        facts = _facts(yard, inputs)
        report, eval_report = (_report(tx, inputs, name) for name in ("dataset", "eval_dataset"))
        judge = _facts(yard, inputs, "reward_model")
        problems = check_finetune(spec, report, facts, eval_report=eval_report, judge=judge)
    elif isinstance(spec, EvaluateSpec):
        reports = {name: _report(tx, inputs, name) for name in ("dataset", "eval_dataset")}
        problems = check_evaluate(spec, reports, _facts(yard, inputs))
    elif isinstance(spec, ServeSpec):
        problems = check_serve(spec, _facts(yard, inputs)) if "adapter" not in inputs else []
    elif isinstance(spec, DownloadSpec):
        problems = check_place(spec, yard.settings.roots)
    elif isinstance(spec, InferenceSpec):
        report = _report(tx, inputs, "prompts")
        problems = [
            *check_inference(spec, _facts(yard, inputs) if spec.max_new_tokens else None),
            *(check_prompts(report) if report else []),
        ]
    if problems:
        raise SpecRejected(problems)


def _facts(yard: Yard, inputs: Inputs, name: str = "model") -> Mapping[str, Any] | None:
    """What the headers of a model say, if it is here already."""
    model = inputs.get(name, {})
    return yard.facts(model) if model.keys() & {"base_model", "artifact"} else None


def _report(tx: Connection, inputs: Inputs, field: str) -> Mapping[str, Any] | None:
    file = inputs.get(field, {}).get("file")
    return files.report_of(tx, UUID(file)) if file else None
