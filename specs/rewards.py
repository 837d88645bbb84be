"""What grpo and rloo say: how answers are drawn, and what they are worth.

Reward functions are a list that stands here; no code of a user's is ever run. Patterns go through
pydantic's engine, which takes time linear in the text.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import SchemaError, SchemaValidator, core_schema

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import ModelRef, Spec, refusal
from tuneyard.specs.generation import TemperatureField
from tuneyard.specs.problems import exclude, nearest, problem

if TYPE_CHECKING:
    from tuneyard.specs.finetune import FinetuneSpec

ONLINE = ("grpo", "rloo")
"""Stages that learn from answers which the model draws while it learns."""

ANSWER = "answer"
"""The column that rewards read unless told otherwise."""

Column = Annotated[str, Field(min_length=1, max_length=200)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]


def _check_tag(name: str) -> str:
    if not all(c.isalnum() or c in "_-" for c in name):
        raise refusal("bad_name", "is no name of a tag", "such as answer, for <answer>…</answer>")
    return name


TagName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_check_tag)]


def pattern_of(text: str) -> SchemaValidator:
    """A pattern ready to be looked for anywhere in a text. Raises: SchemaError."""
    return SchemaValidator(core_schema.str_schema(pattern=text, regex_engine="rust-regex"))


def _check_pattern(text: str) -> str:
    try:
        pattern_of(text)
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1]
        reason = reason.removeprefix("SchemaError: ").removeprefix("error: ").strip(" .")
        hint = "as Rust's regex crate and RE2 read patterns: no look-around, no references"
        raise refusal("bad_pattern", f"is no pattern: {reason[:200]}", hint) from None
    return text


class _Reward(BaseModel):
    """What all reward functions say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @property
    def needs(self) -> str | None:
        """The column that every row must have, if any."""
        return getattr(self, "column", None)


class _Within(_Reward):
    tag: TagName | None = Field(None, description="Look only at what <tag>…</tag> holds.")


class ExactMatch(_Within):
    """1 where the answer is the column's text, but for blanks around it."""

    name: Literal["exact_match"] = "exact_match"
    column: Column = ANSWER
    ignore_case: bool = False


class Contains(_Within):
    """1 where the answer holds the column's text, or ``text``."""

    name: Literal["contains"] = "contains"
    column: Column | None = None
    text: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    ignore_case: bool = False

    @property
    def needs(self) -> str | None:
        """None where a fixed text is looked for."""
        return None if self.text is not None else self.column or ANSWER


class Regex(_Within):
    """1 where the pattern is found in the answer."""

    name: Literal["regex"] = "regex"
    pattern: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_check_pattern)]


class NumericEquality(_Within):
    """1 where the answer's last number is that of the column's text."""

    name: Literal["numeric_equality"] = "numeric_equality"
    column: Column = ANSWER
    tolerance: Annotated[float, Field(ge=0, le=1e12)] = 0.0


class JsonValid(_Within):
    """1 where the answer is JSON; with ``keys`` an object that has all of them."""

    name: Literal["json_valid"] = "json_valid"
    keys: Annotated[list[Column], Field(min_length=1, max_length=100)] | None = None


class Length(_Reward):
    """1 at the target, falling to 0 at a distance of ``within`` (unset: the target itself)."""

    name: Literal["length"] = "length"
    target: Annotated[int, Field(ge=1, le=10**6)]
    within: Annotated[int, Field(ge=1, le=10**6)] | None = None
    unit: Literal["tokens", "words", "characters"] = "tokens"


class Tags(_Reward):
    """1 where the answer is these tags, each once, in this order, with nothing outside of them."""

    name: Literal["format"] = "format"
    tags: Annotated[list[TagName], Field(min_length=1, max_length=20)] = Field(
        default_factory=lambda: ["think", "answer"]
    )


FUNCTIONS: dict[str, type[_Reward]] = {
    "exact_match": ExactMatch,
    "contains": Contains,
    "regex": Regex,
    "numeric_equality": NumericEquality,
    "json_valid": JsonValid,
    "length": Length,
    "format": Tags,
}
"""Name -> what it may say."""


def _named(value: Any) -> Any:
    """A bare name is the function with its defaults."""
    if isinstance(value, BaseModel):
        return value
    said = {"name": value} if isinstance(value, str) else value
    name = said.get("name") if isinstance(said, dict) else None
    if not isinstance(name, str) or name not in FUNCTIONS:
        near = nearest(name, FUNCTIONS) if isinstance(name, str) else None
        hint = f"did you mean {near}?" if near else f"one of {', '.join(FUNCTIONS)}"
        hint += ", or {name: …} with its options"
        raise refusal("bad_choice", "is no reward function", hint)
    return said


def _tag(value: Any) -> str:
    return f"<{value['name'] if isinstance(value, dict) else value.name}>"


RewardFunc = Annotated[
    Annotated[ExactMatch, Tag("<exact_match>")]
    | Annotated[Contains, Tag("<contains>")]
    | Annotated[Regex, Tag("<regex>")]
    | Annotated[NumericEquality, Tag("<numeric_equality>")]
    | Annotated[JsonValid, Tag("<json_valid>")]
    | Annotated[Length, Tag("<length>")]
    | Annotated[Tags, Tag("<format>")],
    Discriminator(_tag),
    BeforeValidator(_named),
]


def _listed(value: Any) -> Any:
    """One function may stand without a list around it."""
    return [value] if isinstance(value, str | dict) else value


class RewardFields(TemperatureField):
    """What a fine-tune of stage grpo or rloo says; names are TRL's."""

    reward_funcs: (
        Annotated[list[RewardFunc], Field(min_length=1, max_length=20), BeforeValidator(_listed)]
        | None
    ) = Field(None, description="What an answer is worth: names, or {name: …} with options.")
    reward_weights: Annotated[list[Number], Field(min_length=1, max_length=20)] | None = Field(
        None, description="Weight of each reward function; unset: 1 each."
    )
    reward_model: ModelRef | None = Field(
        None, description="What stage rm brought forth, which scores answers instead."
    )
    num_generations: int | None = Field(
        None, ge=1, le=4096, description="Answers drawn to a prompt; unset: 8, for rloo 2."
    )
    max_completion_length: int = Field(
        512, ge=1, le=1_048_576, description="Tokens of a drawn answer at most."
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Weight of the distance to the reference; unset: 0, for rloo 0.05.",
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = Field(
        "dapo", description="What grpo divides by: all tokens, each answer's, or a constant."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Whose deviation grpo divides rewards by."
    )
    normalize_advantages: bool = Field(
        False, description="Advantages of rloo with mean 0 and deviation 1 in each step."
    )
    mask_truncated_completions: bool = Field(
        False, description="Answers that did not come to an end teach nothing."
    )

    @property
    def generations(self) -> int:
        """num_generations, or TRL's default for the stage."""
        return self.num_generations or (2 if self._is_rloo else 8)

    @property
    def distance_weight(self) -> float:
        """Beta, or TRL's default for the stage."""
        return (0.05 if self._is_rloo else 0.0) if self.beta is None else self.beta

    @property
    def drawn_at(self) -> float:
        """The temperature of the answers."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def _is_rloo(self) -> bool:
        return getattr(self, "stage", None) == "rloo"


_OF_GRPO = ("loss_type", "scale_rewards")
_OF_RLOO = ("normalize_advantages",)
_OF_OTHERS = ("neftune_noise_alpha",)
"""Fields that make no sense where the model's own answers are learned."""


def reward_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """What grpo and rloo need, and what only they have."""
    told = [name for name in RewardFields.model_fields if name not in Spec.model_fields]
    told = [name for name in told if spec.differs(name)]
    if spec.stage not in ONLINE:
        for name in told:
            if name != "temperature":
                message = f"{name} is of stages grpo and rloo, and this is {spec.stage}."
                yield _clash(message, name, "leave it out, or set stage")
        return
    yield from _source_of_rewards(spec)
    yield from _groups(spec)
    for name in (*(_OF_GRPO if spec.stage == "rloo" else _OF_RLOO), *_OF_OTHERS):
        if spec.differs(name):
            message = f"{name} has no meaning in stage {spec.stage}."
            yield _clash(message, name, "leave it out")
    for name in ("ref_model", "ref_model_adapters"):
        if getattr(spec, name) is not None and not spec.distance_weight:
            message = "beta = 0 compares with no reference."
            yield _clash(message, name, f"set beta, such as 0.04, or leave {name} out")
    if spec.temperature == 0:
        message = "temperature = 0 draws the same answer every time: there is nothing to compare."
        yield problem("out_of_range", message, "temperature", "1, or a little less")


def _source_of_rewards(spec: RewardFields) -> Iterator[InputError]:
    functions, weights = spec.reward_funcs, spec.reward_weights
    if functions and spec.reward_model is not None:
        yield exclude("reward_funcs", "reward_model")
    elif not functions and spec.reward_model is None:
        message = "Nothing says what an answer is worth."
        hint = f"set reward_funcs ({', '.join(FUNCTIONS)}) or reward_model"
        yield problem("missing_field", message, "reward_funcs", hint)
    if weights is not None and len(weights) != len(functions or ()):
        message = f"{len(weights)} weights for {len(functions or ())} reward functions."
        yield _clash(message, "reward_weights", "one for each of reward_funcs, in their order")
    elif weights is not None and not any(weights):
        yield problem("out_of_range", "All weights are 0.", "reward_weights", "leave them out")


def _groups(spec: "FinetuneSpec") -> Iterator[InputError]:
    drawn = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    each = spec.generations
    if each < 2:
        message = "num_generations = 1 leaves no other answer to compare with."
        yield problem("out_of_range", message, "num_generations", "at least 2")
    elif drawn % each:
        message = f"num_generations = {each} does not divide the {drawn} answers of a step."
        hint = (
            f"a multiple of {each} as per_device_train_batch_size x gradient_accumulation_steps,"
            " or another num_generations"
        )
        yield _clash(message, "num_generations", hint)


def _clash(message: str, field: str, hint: str) -> InputError:
    return problem("conflicting_fields", message, field, hint)
