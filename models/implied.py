"""Work that a job needs done before it, and nobody asked for by name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tuneyard.models.inputs import Inputs
from tuneyard.specs.download import implied_download
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import JobSpec
from tuneyard.specs.prepare import prepare_spec


@dataclass(frozen=True)
class Work:
    """A job to be made or, where one does or has done the same, to be shared."""

    spec: JobSpec
    inputs: Inputs = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells work apart: its kind, all arguments with their defaults, its inputs by id."""
        said = [self.spec.kind, self.spec.arguments(), self.inputs]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def downloads_for(_: JobSpec, inputs: Inputs) -> Mapping[str, Work]:
    """Field that names a model which is not here -> the download that brings it."""
    sources = {name: value["source"] for name, value in inputs.items() if "source" in value}
    found = {name: implied_download(source) for name, source in sources.items()}
    return {name: Work(spec) for name, spec in found.items() if spec is not None}


def tokens_for(spec: JobSpec, inputs: Inputs) -> Mapping[str, Work]:
    """The tokens that a fine-tune learns from -> the job that makes them."""
    if not isinstance(spec, FinetuneSpec):
        return {}
    prepare = prepare_spec(spec)
    fields = {reference.field for reference in prepare.references()}
    return {"tokens": Work(prepare, {name: inputs[name] for name in inputs if name in fields})}


IMPLIED = (downloads_for, tokens_for)
"""In this order: what a later one needs, an earlier one brings."""
