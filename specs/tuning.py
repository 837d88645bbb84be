"""Which parameters of a base learn, in which number format, and from where they begin."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import AdapterRef, Spec, Words, given, refusal, words_in
from tuneyard.specs.numbers import PRECISION, Precision, Share
from tuneyard.specs.problems import exclude, problem

if TYPE_CHECKING:
    from tuneyard.specs.finetune import FinetuneSpec

WHOLE = frozenset({"full", "freeze"})
"""Types of tuning that change the base's own weights, so that a whole model comes of them."""

PROMPTS = frozenset({"prefix", "p_tuning", "prompt_tuning"})
"""Types that put learned vectors before the text: there is nothing in them to add to weights."""

MERGEABLE = ("lora", "oft", "adalora", "vera", "ia3")

_MEANT = {
    "qlora": "lora with quantization_bit: 4",
    "dora": "lora with use_dora: true",
    "rslora": "lora with use_rslora: true",
    "lora+": "lora with loraplus_lr_ratio: 16",
    "loraplus": "lora with loraplus_lr_ratio: 16",
    "pissa": "lora with pissa_init: true",
    "prefix_tuning": "prefix",
    "prompt": "prompt_tuning",
}


def _known_type(value: Any) -> Any:
    """Other words for the types of tuning."""
    word = value.lower().replace("-", "_") if isinstance(value, str) else value
    if isinstance(word, str) and word in _MEANT:
        raise refusal("bad_choice", "is no type of tuning", f"use {_MEANT[word]}")
    return word if word == "p_tuning" else value


def _each_once(layers: list[int]) -> list[int]:
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise refusal("out_of_range", f"names layer {twice} twice", "name each layer once")
    return layers


def _split(value: Any) -> Any:
    """LLaMA-Factory's list of adapters: names with commas between them."""
    if isinstance(value, str) and "," in value:
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _form(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<one>"


Adapters = Annotated[
    Annotated[AdapterRef, Tag("<one>")]
    | Annotated[list[AdapterRef], Field(min_length=1, max_length=16), Tag("<list>")],
    Discriminator(_form),
    BeforeValidator(_split),
]


class TuningFields(Spec):
    """What a fine-tune says of the parameters that learn."""

    finetuning_type: Annotated[
        Literal[
            "lora", "full", "freeze", "oft", "adalora", "vera", "ia3",
            "prefix", "p_tuning", "prompt_tuning",
        ],
        BeforeValidator(_known_type),
    ] = Field("lora", description="Which parameters learn.")  # fmt: skip
    adapter: Adapters | None = Field(
        None,
        description="Adapters to go on from: all but the last become part of the base, the last "
        "one learns on.",
    )
    create_new_adapter: bool = Field(
        False, description="All of `adapter` become part of the base, and a new one learns."
    )
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
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, le=10_000, description="LoRA+: B learns so many times faster than A."
    )
    loraplus_lr_embedding: float = Field(
        1e-6, gt=0, le=10, description="LoRA+: learning rate of an embedding's B."
    )
    pissa_init: bool = Field(False, description="Begin with the base's largest singular values.")
    pissa_iter: int = Field(
        16, ge=-1, le=1000, description="Steps to find them; -1: the whole decomposition."
    )
    pissa_convert: bool = Field(
        False, description="Accepted: the result always stands over the untouched base."
    )
    oft_rank: int = Field(0, ge=0, le=100_000, description="Blocks of a layer; 0: by their size.")
    oft_block_size: int = Field(
        32, ge=0, le=100_000, description="Size of a block; 0 where oft_rank is set."
    )
    oft_target: Words = Field("all", description="As lora_target, for oft.")
    module_dropout: Share = Field(0.0, description="Share of oft's blocks that are left out.")
    adalora_init_rank: int | None = Field(
        None, ge=1, le=1024, description="adalora's rank before it is cut; unset: 1.5 x lora_rank."
    )
    vera_rank: int = Field(256, ge=1, le=65_536, description="Rank of vera's frozen projections.")
    num_virtual_tokens: int = Field(
        20, ge=1, le=10_000, description="Learned vectors before the text, for prompt tunings."
    )
    freeze_trainable_layers: int = Field(
        2, ge=-9_999, le=9_999, description="freeze: so many last layers learn; below 0: first."
    )
    freeze_trainable_modules: Words = Field(
        "all", description="freeze: parts of these layers that learn, such as mlp; `all`."
    )
    freeze_extra_modules: Words | None = Field(
        None, description="freeze: modules outside the layers that learn as well."
    )
    use_llama_pro: bool = Field(
        False, description="Every n-th layer learns, not the last ones; for freeze and lora."
    )
    quantization_bit: Literal[4, 8] | None = Field(
        None, description="The frozen base in so many bits (QLoRA), by bitsandbytes."
    )
    quantization_type: Literal["nf4", "fp4"] = Field("nf4", description="Of 4 bits.")
    double_quantization: bool = Field(True, description="Quantise the scales of 4 bits as well.")

    precision: Precision = PRECISION
    bf16: bool = Field(False, description="Weights in bfloat16, what learns in fp32.")
    fp16: bool = Field(False, description="Weights in half precision.")
    pure_bf16: bool = Field(False, description="Weights and what learns in bfloat16.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    disable_gradient_checkpointing: bool = Field(False, description="Never do that.")
    full_determinism: bool = Field(
        False, description="The same bits from run to run on a GPU too; takes more time."
    )

    @property
    def adapters(self) -> list[str | dict[str, str]]:
        """The adapters to go on from, in their order, as they were written."""
        if self.adapter is None:
            return []
        listed = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        return [given(each) for each in listed]

    @property
    def goes_on(self) -> bool:
        """Whether the last adapter learns on."""
        return self.adapter is not None and not self.create_new_adapter


SHAPING = TuningFields.model_fields.keys() - Spec.model_fields.keys() - {
    "lora_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_lr_embedding",
    "pissa_convert", "precision", "bf16", "fp16", "pure_bf16",
    "gradient_checkpointing", "disable_gradient_checkpointing", "full_determinism",
}  # fmt: skip
"""Fields that what learns, its shape or its beginning follows from."""

OF_A_NEW_ADAPTER = frozenset(
    {"lora_rank", "lora_alpha", "lora_dropout", "lora_target", "layers_to_transform"}
    | {"additional_target", "use_rslora", "use_dora", "use_llama_pro"}
    | {"oft_rank", "oft_block_size", "oft_target", "module_dropout"}
)
"""Fields that an adapter which goes on has said already."""

_READ_BY: Mapping[str, tuple[str, ...]] = {
    "lora_rank": ("lora", "adalora"),
    "lora_alpha": ("lora", "adalora"),
    "lora_dropout": ("lora", "adalora", "vera"),
    "lora_target": ("lora", "adalora", "vera", "ia3"),
    "additional_target": MERGEABLE,
    "oft_rank": ("oft",),
    "oft_block_size": ("oft",),
    "oft_target": ("oft",),
    "module_dropout": ("oft",),
    "adalora_init_rank": ("adalora",),
    "vera_rank": ("vera",),
    "num_virtual_tokens": tuple(sorted(PROMPTS)),
    "freeze_trainable_layers": ("freeze",),
    "freeze_trainable_modules": ("freeze",),
    "freeze_extra_modules": ("freeze",),
    "loraplus_lr_embedding": ("lora",),
    "pissa_iter": ("lora",),
    "pissa_convert": ("lora",),
}
"""Field -> types of tuning that read it."""

_ONLY: Mapping[str, tuple[str, ...]] = {
    "use_dora": ("lora",),
    "use_rslora": ("lora",),
    "loraplus_lr_ratio": ("lora",),
    "pissa_init": ("lora",),
    "use_llama_pro": ("lora", "freeze"),
    "layers_to_transform": ("lora", "oft", "adalora", "vera"),
    "quantization_bit": ("lora", "oft"),
    "adapter": ("lora", "oft"),
}
"""Field -> types of tuning without which it cannot be done as asked."""


def idle_fields(spec: TuningFields) -> list[str]:
    """Fields that were set and that this type of tuning does not read."""
    kind, told = spec.finetuning_type, spec.model_fields_set
    idle = [name for name, types in _READ_BY.items() if name in told and kind not in types]
    if spec.use_llama_pro and kind == "lora":
        idle = [name for name in idle if name != "freeze_trainable_layers"]
    return idle


def tuning_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Combinations that cannot work, as LLaMA-Factory and peft refuse them at start."""
    kind = spec.finetuning_type
    for name, types in _ONLY.items():
        if getattr(spec, name) and kind not in types:
            message = f"{name} is not for finetuning_type {kind}."
            yield problem("conflicting_fields", message, name, _mend(name, kind, types))
    yield from _quantised(spec)
    yield from _begun(spec)
    yield from _of_stage(spec)
    yield from _sizes(spec)


def _of_stage(spec: "FinetuneSpec") -> Iterator[InputError]:
    """What a stage cannot learn by."""
    kind, stage = spec.finetuning_type, spec.stage
    if kind in PROMPTS and stage not in ("sft", "pt"):
        message = f"{kind} learns answers or texts, and stage {stage} compares."
        yield problem("conflicting_fields", message, "finetuning_type", "lora")
    if spec.adapter is not None and stage == "rm":
        message = "A reward model's head is learned with an adapter of its own."
        hint = "merge the other first (`tuneyard merge JOB`), and name the merged model as model; "
        hint += "one that is a reward model itself is learned anew over its base"
        yield problem("conflicting_fields", message, "adapter", hint)
    if kind in WHOLE and stage == "rm":
        message = "A reward model is an adapter with a head over its base."
        yield problem("conflicting_fields", message, "finetuning_type", "lora")
    beside = ("additional_target", "use_dora")
    more = "stage rm" if stage == "rm" else next((n for n in beside if getattr(spec, n)), None)
    if spec.pissa_init and more:
        message = f"pissa_init leaves a sum of factors, and {more} learns more than factors."
        yield problem("conflicting_fields", message, "pissa_init", "leave it out")
    if spec.pissa_init and spec.compares:
        message = "pissa_init takes a part out of the base, which is what answers are compared with"
        yield problem("conflicting_fields", f"{message}.", "pissa_init", "leave it out")


def _sizes(spec: TuningFields) -> Iterator[InputError]:
    """Numbers and choices of one type of tuning that leave nothing to learn, or fit ill."""
    kind = spec.finetuning_type
    if spec.create_new_adapter and spec.adapter is None:
        message, hint = "create_new_adapter lies over nothing.", "leave it out, or name an adapter"
        yield problem("missing_field", message, "adapter", hint)
    whole = set(words_in(spec.additional_target)) & set(words_in(spec.lora_target))
    if whole:
        message = f"{min(whole)} learns as a whole by additional_target, and gets no adapter then."
        hint = "name it in one of lora_target and additional_target"
        yield problem("conflicting_fields", message, "additional_target", hint)
    if kind == "freeze" and not spec.freeze_trainable_layers and not spec.freeze_extra_modules:
        message = "freeze_trainable_layers = 0 lets nothing learn."
        yield problem("nothing_to_do", message, "freeze_trainable_layers", "a number above 0")
    if spec.use_llama_pro and spec.freeze_trainable_layers < 1:
        message = "use_llama_pro needs a number of layers."
        yield problem("out_of_range", message, "freeze_trainable_layers", "1 or more")
    if spec.use_llama_pro and spec.layers_to_transform:
        yield exclude("use_llama_pro", "layers_to_transform")
    if kind == "oft" and bool(spec.oft_rank) == bool(spec.oft_block_size):
        message = "oft_rank x oft_block_size is a layer's width: one of them is 0."
        yield problem("conflicting_fields", message, "oft_rank", "set the other one to 0")
    if kind == "oft" and spec.oft_block_size == 1:
        message = "oft_block_size = 1: a block of one number cannot turn, nothing would learn."
        yield problem("nothing_to_do", message, "oft_block_size", "2 or more, for example 32")
    if kind == "prefix" and spec.gradient_checkpointing:
        message = "A learned prefix is a cache, which gradient_checkpointing throws away."
        hint = "leave it out, or use finetuning_type prompt_tuning"
        yield problem("conflicting_fields", message, "gradient_checkpointing", hint)
    if kind == "adalora" and (spec.adalora_init_rank or 1024) <= spec.lora_rank:
        message = f"adalora_init_rank is cut to lora_rank = {spec.lora_rank}, and is not above it."
        yield problem("out_of_range", message, "adalora_init_rank", f"above {spec.lora_rank}")


def _mend(name: str, kind: str, types: tuple[str, ...]) -> str:
    if name == "adapter":
        return "merge it first (`tuneyard merge JOB`), and name the merged model as model"
    if name == "quantization_bit" and kind in WHOLE:
        return "quantised weights cannot learn: finetuning_type lora, or no quantization_bit"
    return f"finetuning_type {' or '.join(types)}, or leave it out"


def _quantised(spec: TuningFields) -> Iterator[InputError]:
    """What cannot be done over a quantised base. Source: LLaMA-Factory, model/adapter.py."""
    if spec.quantization_bit is None:
        return
    for name in ("pissa_init", "create_new_adapter"):
        if getattr(spec, name):
            message = f"{name} changes the base's weights, and a quantised base keeps its own."
            yield problem("conflicting_fields", message, name, "leave quantization_bit out")
    if spec.quantization_bit == 8 and spec.use_dora:
        message = "use_dora takes the norms of weights, which bitsandbytes keeps none of in 8 bits."
        yield problem("conflicting_fields", message, "use_dora", "quantization_bit: 4")
    if len(spec.adapters) > 1:
        message = "A quantised base takes one adapter: others would have to be merged into it."
        hint = "merge the others first (`tuneyard merge JOB`), and name the merged model as model"
        yield problem("conflicting_fields", message, "adapter", hint)


def _begun(spec: TuningFields) -> Iterator[InputError]:
    """An adapter that goes on is as it was made."""
    if spec.goes_on and spec.pissa_init:
        message = "An adapter that goes on begins where it ended, not by pissa_init."
        hint = "leave pissa_init out, or set create_new_adapter: true"
        yield problem("conflicting_fields", message, "pissa_init", hint)
    if len({str(each) for each in spec.adapters}) < len(spec.adapters):
        message, hint = "One adapter is named twice: it would be applied twice.", "name each once"
        yield problem("conflicting_fields", message, "adapter", hint)
    if spec.adapter is not None and spec.finetuning_type == "oft" and len(spec.adapters) > 1:
        message = "Adapters of type oft are not summed."
        hint = "merge the first ones (`tuneyard merge JOB`), and name the merged model as model"
        yield problem("conflicting_fields", message, "adapter", hint)
    laid_over = spec.create_new_adapter and spec.adapter is not None
    if (laid_over or len(spec.adapters) > 1) and spec.finetuning_type == "lora":
        for name in ("use_dora", "additional_target"):
            if getattr(spec, name):
                message = f"{name} cannot be summed with the adapters below into one."
                hint = "merge them first (`tuneyard merge JOB`), and name the merged model as model"
                yield problem("conflicting_fields", message, name, hint)
    if laid_over and spec.finetuning_type == "oft":
        message, hint = "A new oft adapter over another is not one adapter.", "merge that one first"
        yield problem("conflicting_fields", message, "create_new_adapter", hint)


Use = Literal["merge", "lora", "oft", "sum", "reward", "speak"]
"""What an adapter is wanted for: to be merged, to learn on as such a one, to be summed up, to say
what answers are worth, to be asked or compared with."""


def use_refused(use: Use, made_by: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why an adapter that a fine-tune of this document made is not fit for a use, and the mend."""
    kind = made_by.get("finetuning_type", "lora")
    if use == "reward":
        if made_by.get("stage") == "rm" or made_by.get("kind") == "download":
            return None
        return "It scores no answers.", "name what a fine-tune of stage rm brought forth"
    if made_by.get("stage") == "rm":
        message = "It is a reward model, which scores answers and writes none."
        return message, "name an adapter of another stage"
    if use == "speak":
        return None
    if use == "merge":
        if kind in PROMPTS:
            message = f"An adapter of type {kind} is no change of weights and cannot be merged."
            return message, "ask it as it is: model: its name; or tune by finetuning_type lora"
        return None
    if use == "sum":
        odd = next((n for n in ("use_dora", "additional_target") if made_by.get(n)), None)
        if kind == "lora" and odd is None:
            return None
        message = f"It was made by {odd or f'finetuning_type {kind}'}: it is no sum of factors."
        return message, "merge it first (`tuneyard merge JOB`), and name the merged model as model"
    if kind == use:
        return None
    message = f"It was made by finetuning_type {kind}, and this goes on by {use}."
    if kind in ("lora", "oft"):
        return message, f"finetuning_type {kind}"
    return message, "merge it first where it can be, and name the merged model as model"
