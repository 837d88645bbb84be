"""Numbers as specs say them: counts, shares, what may be either; and their formats."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.fields import refusal

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
