"""How far and how fast parameters move: steps, batches, learning rate, optimizer."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import Spec, Word
from tuneyard.specs.numbers import MOST, CountOrShare, Share
from tuneyard.specs.problems import nearest, problem

if TYPE_CHECKING:
    from tuneyard.specs.finetune import FinetuneSpec

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]
_SHAPES = frozenset({"linear", "cosine", "1-sqrt"})
_MODES = frozenset({"min", "max"})
_THRESHOLDS = frozenset({"rel", "abs"})
Kind = type[float] | type[int] | type[bool] | frozenset[str]
SCHEDULE_OPTIONS: Mapping[str, Mapping[str, Kind]] = {
    "cosine": {"num_cycles": float},
    "cosine_with_restarts": {"num_cycles": float},
    "cosine_with_min_lr": {"num_cycles": float, "min_lr": float, "min_lr_rate": float},
    "cosine_warmup_with_min_lr": {
        "num_cycles": float, "min_lr": float, "min_lr_rate": float, "warmup_lr_rate": float
    },
    "polynomial": {"lr_end": float, "power": float},
    "inverse_sqrt": {"timescale": float},
    "warmup_stable_decay": {
        "num_decay_steps": int, "num_stable_steps": int, "warmup_type": _SHAPES,
        "decay_type": _SHAPES, "min_lr_ratio": float, "num_cycles": float,
    },
    "reduce_lr_on_plateau": {
        "mode": _MODES, "factor": float, "patience": int, "threshold": float,
        "threshold_mode": _THRESHOLDS, "cooldown": int, "min_lr": float, "eps": float,
    },
    "greedy": {
        "mode": _MODES, "factor": float, "patience": int, "threshold": float,
        "threshold_mode": _THRESHOLDS, "cooldown": int, "warmup": int, "min_lr": float,
        "max_lr": float, "eps": float, "smooth": bool, "window_size": int, "reset_start": int,
    },
}  # fmt: skip
"""Schedule -> what its ``lr_scheduler_kwargs`` may hold, and as what; others take none."""


def _form(value: Any) -> str:
    if isinstance(value, bool):
        return "<flag>"
    return "<text>" if isinstance(value, str) else "<number>"


Option = Annotated[
    Annotated[float, Field(ge=0, le=MOST), Tag("<number>")]
    | Annotated[bool, Tag("<flag>")]
    | Annotated[Word, Tag("<text>")],
    Discriminator(_form),
]


class OptimizingFields(Spec):
    """What a fine-tune says of its steps."""

    per_device_train_batch_size: int = Field(8, ge=1, le=4096, description="Rows at a time.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=65_536, description="Batches that make one optimizer step."
    )
    learning_rate: float = Field(5e-5, gt=0, le=10, description="Peak learning rate.")
    num_train_epochs: float = Field(3.0, gt=0, le=10_000, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, le=MOST, description="Optimizer steps; above 0 it counts.")
    lr_scheduler_type: Schedule = Field("linear", description="How the learning rate moves.")
    lr_scheduler_kwargs: dict[str, Option] | None = Field(
        None, description="Its options, for example num_cycles or min_lr."
    )
    warmup_steps: CountOrShare = Field(0, description="Warm-up in steps, or below 1 as a share.")
    warmup_ratio: Share = Field(0.0, description="Warm-up as a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's weight decay.")
    adam_beta1: Share = Field(0.9, description="AdamW's first moment.")
    adam_beta2: Share = Field(0.999, description="AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, le=MOST, description="Gradients are clipped to it; 0: never."
    )
    label_smoothing_factor: Share = Field(
        0.0, description="Share of each target that is spread over the vocabulary."
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=10_000, description="Noise on embeddings."
    )
    disable_shuffling: bool = Field(False, description="Keep the rows in their order.")


def schedule_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Options that the schedule knows; it would fail on the GPU otherwise."""
    name, options = spec.lr_scheduler_type, spec.lr_scheduler_kwargs or {}
    known = SCHEDULE_OPTIONS.get(name, {})
    for option, value in options.items():
        field = f"lr_scheduler_kwargs.{option[:60]}"
        if option not in known:
            near = nearest(option, sorted(known))
            hint = f"did you mean {near}?" if near else f"one of: {', '.join(sorted(known))}"
            message = f"The schedule {name} has no option {option[:60]!r}."
            yield problem("unknown_field", message, field, hint if known else "leave it out")
        elif expected := _wrong(value, known[option]):
            message = f"{field} = {value!r} cannot be."
            yield problem("wrong_type", message, field, expected)
    if "with_min_lr" in name and not options.keys() & {"min_lr", "min_lr_rate"}:
        message, hint = f"{name} needs min_lr or min_lr_rate.", "for example {min_lr_rate: 0.1}"
        yield problem("missing_field", message, "lr_scheduler_kwargs", hint)
    if {"min_lr", "min_lr_rate"} <= options.keys():
        message, field = "min_lr and min_lr_rate say the same.", "lr_scheduler_kwargs.min_lr"
        yield problem("conflicting_fields", message, field, "give one of them")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        message, hint = f"{name} needs num_decay_steps.", "for example {num_decay_steps: 100}"
        yield problem("missing_field", message, "lr_scheduler_kwargs", hint)
    end = options.get("lr_end", 0)
    if name == "polynomial" and isinstance(end, float | int) and end >= spec.learning_rate:
        message = f"lr_end = {end:g} is not below learning_rate."
        yield problem("out_of_range", message, "lr_scheduler_kwargs.lr_end", None)
    factor = options.get("factor", 0.1)
    if "factor" in known and isinstance(factor, float | int) and not 0 < factor < 1:
        message = f"factor = {factor:g} is not between 0 and 1."
        yield problem("out_of_range", message, "lr_scheduler_kwargs.factor", "for example 0.5")
    yield from _rates(spec, options)
    if name == "greedy":
        yield from _greedy(spec, options)


def _rates(spec: "FinetuneSpec", options: Mapping[str, Any]) -> Iterator[InputError]:
    """Least rates above the peak, and a decay that begins before the first step."""
    limits = {"min_lr_rate": 1.0, "min_lr_ratio": 1.0, "warmup_lr_rate": 1.0}
    if spec.lr_scheduler_type != "greedy":
        limits["min_lr"] = spec.learning_rate
    for option, most in limits.items():
        value = options.get(option, 0)
        if isinstance(value, float | int) and value > most:
            peak = "learning_rate" if option == "min_lr" else "1, which is learning_rate"
            message = f"{option} = {value:g} is above {peak}."
            field, hint = f"lr_scheduler_kwargs.{option}", f"{most / 10:g} or so"
            yield problem("out_of_range", message, field, hint)
    decay = options.get("num_decay_steps", 0)
    if isinstance(decay, float | int) and 0 < spec.max_steps < decay:
        message = f"num_decay_steps = {decay:g} is more than max_steps = {spec.max_steps}: "
        message += "the rate would never be learning_rate."
        hint = f"at most {spec.max_steps}"
        yield problem("out_of_range", message, "lr_scheduler_kwargs.num_decay_steps", hint)


def _greedy(spec: "FinetuneSpec", options: Mapping[str, Any]) -> Iterator[InputError]:
    """Its least rate of 0.001 by default is above what fine-tunes use."""
    least = options.get("min_lr", 1e-3)
    if isinstance(least, float | int) and least > spec.learning_rate:
        message = f"The schedule greedy never goes below min_lr = {least:g}, and learning_rate is "
        message += f"{spec.learning_rate:g}."
        hint = f"lr_scheduler_kwargs: {{min_lr: {spec.learning_rate / 100:g}}}"
        yield problem("out_of_range", message, "lr_scheduler_kwargs.min_lr", hint)


def _wrong(value: object, kind: Kind) -> str | None:
    """What an option is expected to be, unless it is that."""
    if isinstance(kind, frozenset):
        return None if value in kind else f"one of: {', '.join(sorted(kind))}"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool | str):
        return "a number"
    whole = kind is not int or float(value) == int(float(value))  # type: ignore[arg-type]
    return None if whole else "a whole number"


def smoothing_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Smoothing is of next tokens."""
    if spec.label_smoothing_factor and spec.stage not in ("sft", "pt"):
        message = f"label_smoothing_factor has no meaning with stage: {spec.stage}."
        hint = "dpo_label_smoothing" if spec.stage == "dpo" else "leave it out"
        yield problem("conflicting_fields", message, "label_smoothing_factor", hint)
