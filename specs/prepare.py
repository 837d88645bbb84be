"""What ``kind: prepare`` may say, and which one a fine-tune needs."""

from typing import Literal

from tuneyard.specs.fields import Spec
from tuneyard.specs.finetune import FinetuneSpec, RowsSpec


class PrepareSpec(RowsSpec):
    """Turn rows into tokens, on a CPU slot, before a GPU is taken."""

    kind: Literal["prepare"] = "prepare"

    @property
    def wants_gpu(self) -> bool:
        """Tokenising never takes a GPU."""
        return False


def prepare_spec(spec: FinetuneSpec) -> PrepareSpec:
    """The work that a fine-tune needs done first; equal work is an equal spec."""
    asked = {name: getattr(spec, name) for name in _OF_THE_ROWS}
    defaults = {name: PrepareSpec.model_fields[name].get_default() for name in asked}
    return PrepareSpec(**{name: asked[name] for name in asked if asked[name] != defaults[name]})


_OF_THE_ROWS = [name for name in RowsSpec.model_fields if name not in Spec.model_fields]
"""What RowsSpec says itself; priority and the like are each job's own."""
