"""Numbers as specs say them: counts, shares, and what may be either."""

from typing import Annotated

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
StepsOrShare = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_whole_from_one)]
