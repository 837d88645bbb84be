"""What a tuned model is made to say of rows that it did not learn, and how that is measured."""

from collections.abc import Iterator

from pydantic import Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.generation import TemperatureField
from tuneyard.specs.problems import problem


class PredictingFields(TemperatureField):
    """What a job says of measuring held-out rows. How it speaks: LLaMA-Factory's defaults."""

    do_eval: bool = Field(
        False, description="Measure the held-out rows, at least before the first step and at last."
    )
    do_predict: bool = Field(
        False,
        description="Answer the held-out rows at last: generated_predictions.jsonl, BLEU-4, ROUGE.",
    )
    predict_with_generate: bool = Field(
        False, description="Held-out rows are answered, which do_predict needs."
    )
    compute_accuracy: bool = Field(
        False, description="Share of tokens that were the likeliest, beside eval_loss."
    )
    do_sample: bool = Field(True, description="Predicting, false: the likeliest token.")
    top_p: float = Field(0.7, gt=0, le=1, description="Nucleus that is drawn from.")
    top_k: int = Field(
        50, ge=0, le=10**6, description="Likeliest tokens that are drawn from; 0: all."
    )
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Above 1: fewer.")
    max_new_tokens: int = Field(
        1024, ge=1, le=1_048_576, description="Tokens of a predicted answer at most."
    )

    @property
    def spoken_at(self) -> float:
        """The temperature of predicted answers; 0 is the likeliest token."""
        if not self.do_sample:
            return 0.0
        return 0.95 if self.temperature is None else self.temperature

    @property
    def measures(self) -> bool:
        """Whether held-out rows are measured at all."""
        return self.do_eval

    @property
    def generates(self) -> bool:
        """Whether held-out rows are answered."""
        return self.predict_with_generate and (self.do_predict or self.measures)


SPEAKING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
"""How held-out rows are answered."""


def idle_settings(spec: PredictingFields) -> list[str]:
    """Settings of answers that were set and that nothing is answered by."""
    return [] if spec.generates else [name for name in SPEAKING if name in spec.model_fields_set]


def predicting_clashes(
    spec: PredictingFields, *, stage: str, held_out: bool
) -> Iterator[InputError]:
    """What cannot be predicted, as LLaMA-Factory refuses it at start.

    held_out: there are rows to predict.
    """
    if stage != "sft":
        for name in ("do_predict", "predict_with_generate"):
            if getattr(spec, name):
                message = f"{name} answers rows, which stage {stage} has no answers for."
                hint = "stage: sft, or leave it out"
                yield problem("conflicting_fields", message, name, hint)
    elif spec.do_predict and not spec.predict_with_generate:
        message = "do_predict keeps what the model says, and nothing makes it speak."
        hint = "predict_with_generate: true"
        yield problem("missing_field", message, "predict_with_generate", hint)
    if spec.predict_with_generate and spec.compute_accuracy:
        message = "predict_with_generate and compute_accuracy exclude each other."
        yield problem("conflicting_fields", message, "compute_accuracy", "give one of them")
    asked = [name for name in NEED_ROWS if getattr(spec, name)]
    if asked and not held_out:
        message = f"{asked[0]}: there are no rows to do it on."
        hint = "set eval_dataset, or val_size"
        yield problem("conflicting_fields", message, asked[0], hint)


NEED_ROWS = ("do_predict", "do_eval", "predict_with_generate")
"""What only held-out rows make sense for."""
