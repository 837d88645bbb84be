"""How a model speaks: what inference jobs, serve jobs and single requests may say about it."""

from pydantic import BaseModel, Field

from tuneyard.specs.fields import Spec, Words


class TemperatureField(Spec):
    """How freely a model that is tuned answers, where it is made to."""

    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Of answers; unset: 1 where a stage draws them to learn from, 0.95 where "
        "held-out rows are answered; 0: the likeliest token.",
    )


class Generation(BaseModel):
    """Unset leaves a setting to whoever is asked next: the job, the model's files, OpenAI."""

    max_new_tokens: int | None = Field(
        None, ge=1, le=1_048_576, description="Tokens of an answer at most; unset: the model's end."
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0: the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus that is drawn from.")
    top_k: int | None = Field(
        None, ge=0, le=10**6, description="Likeliest tokens that are drawn from; 0: all."
    )
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Above 1: fewer.")
    do_sample: bool | None = Field(None, description="False: the likeliest token.")
    stop: Words | None = Field(None, description="Texts that end an answer.")
