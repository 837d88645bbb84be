"""Which parameters of a base learn, and in which number format."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.fields import Spec, Words, refusal
from tuneyard.specs.numbers import Share


def _each_once(layers: list[int]) -> list[int]:
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise refusal("out_of_range", f"names layer {twice} twice", "name each layer once")
    return layers


class TuningFields(Spec):
    """What a fine-tune says of the parameters that learn."""

    finetuning_type: Literal["lora"] = Field("lora", description="Which parameters learn.")
    lora_rank: int = Field(8, ge=1, le=1024, description="Rank of the adapter.")
    lora_alpha: int | None = Field(
        None, ge=1, le=10**6, description="Scale; unset: twice the rank."
    )
    lora_dropout: Share = Field(0.0, description="Dropout before the adapter.")
    lora_target: Words = Field(
        "all", description="Names of the layers that get an adapter; `all`: every linear one."
    )
    layers_to_transform: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=9_999)]],
            Field(min_length=1, max_length=1000),
            AfterValidator(_each_once),
        ]
        | None
    ) = Field(None, description="Indexes of the layers that get an adapter; unset: all.")
    additional_target: Words | None = Field(
        None, description="Modules that learn as a whole beside the adapter."
    )
    use_rslora: bool = Field(False, description="Scale by the root of the rank.")
    use_dora: bool = Field(False, description="Split weights into size and direction.")

    bf16: bool = Field(False, description="Weights in bfloat16, the adapter in fp32.")
    fp16: bool = Field(False, description="Weights in half precision.")
    pure_bf16: bool = Field(False, description="Weights and adapter in bfloat16.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    disable_gradient_checkpointing: bool = Field(False, description="Never do that.")
