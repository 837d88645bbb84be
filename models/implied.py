"""Work that a job needs done before it, and nobody asked for by name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from tuneyard.models.inputs import Inputs
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import JobSpec
from tuneyard.specs.prepare import prepare_spec


@dataclass(frozen=True)
class Work:
    """A job to be made or, where one does or has done the same, to be shared."""

    spec: JobSpec
    inputs: Inputs

    @property
    def key(self) -> str:
        """What tells work apart: its kind, all arguments with their defaults, its inputs by id."""
        said = [self.spec.kind, self.spec.arguments(), self.inputs]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def implied_by(spec: JobSpec, inputs: Inputs) -> Mapping[str, Work]:
    """Input that a job needs beside those that its spec names -> the work that brings it."""
    if not isinstance(spec, FinetuneSpec):
        return {}
    prepare = prepare_spec(spec)
    fields = {reference.field for reference in prepare.references()}
    return {"tokens": Work(prepare, {name: inputs[name] for name in inputs if name in fields})}
