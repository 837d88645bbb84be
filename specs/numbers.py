"""Numbers as specs say them: counts, shares, what may be either; and their formats."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import refusal
from tuneyard.specs.problems import exclude

MOST = 10**9


def _whole_from_one(number: float) -> float:
    if number >= 1 and number != int(number):
        raise refusal("out_of_range", "is neither below 1 nor whole", "below 1 it is a share")
    return number


Positive = Annotated[int, Field(ge=1, le=MOST)]
Share = Annotated[float, Field(ge=0, lt=1)]
CountOrShare = Annotated[float, Field(ge=0, le=MOST), AfterValidator(_whole_from_one)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISION: Any = Field(
    "auto",
    description="Format of frozen weights and products; auto: bf16 and fp16 say, else the"
    " base's own.",
)
StepsOrShare = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_whole_from_one)]


def asked_format(spec: Any) -> Precision:
    """The format that a fine-tune or an evaluation asks for, by whichever field."""
    if spec.bf16 or spec.pure_bf16:
        return "bf16"
    return "fp16" if spec.fp16 else spec.precision


def format_clashes(spec: Any) -> Iterator[InputError]:
    """Fields that ask for two formats at once."""
    formats = {"bf16": "bf16", "pure_bf16": "bf16", "fp16": "fp16"}
    told = [name for name in formats if getattr(spec, name)]
    if spec.fp16:
        yield from (exclude(name, "fp16") for name in told if name != "fp16")
    if spec.precision != "auto":
        yield from (exclude(n, "precision") for n in told if formats[n] != spec.precision)
