"""Which optimizer moves the parameters: transformers' names, LLaMA-Factory's switches, packages."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import Spec, Text, Words, refusal
from tuneyard.specs.numbers import MOST, Positive, asked_format
from tuneyard.specs.problems import nearest, problem
from tuneyard.specs.rewards import ONLINE

if TYPE_CHECKING:
    from tuneyard.specs.finetune import FinetuneSpec

Optim = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "sgd",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "stable_adamw",
]

PLAIN = frozenset({"adamw_torch", "adamw_torch_fused"})
EIGHT_BIT = frozenset({"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"})

OPTIM_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "adamw_torch_4bit": {"block_size": int, "bf16_stochastic_round": bool},
    "adamw_torch_8bit": {"block_size": int, "bf16_stochastic_round": bool},
    "sgd": {"momentum": float, "dampening": float, "weight_decay": float, "nesterov": bool},
    "adagrad": {"lr_decay": float, "weight_decay": float, "eps": float},
    "rmsprop": {
        "momentum": float, "alpha": float, "eps": float, "weight_decay": float, "centered": bool
    },
    "ademamix": {
        "beta1": float, "beta2": float, "beta3": float, "alpha": float, "eps": float,
        "t_alpha": int, "t_beta3": int,
    },
    "galore": {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str},
    "apollo": {
        "rank": int, "proj": str, "scale_type": str, "update_proj_gap": int, "scale": float,
        "proj_type": str,
    },
    "grokadamw": {
        "alpha_init": float, "lamb": float, "gamma": float, "grokking_signal_decay_rate": float,
        "gradient_clipping": float,
    },
    "schedule_free": {"weight_lr_power": float, "r": float},
    "stable_adamw": {"max_lr": float, "kahan_sum": bool, "decouple_lr": bool},
}  # fmt: skip
"""Optimizer, or family of them -> what its ``optim_args`` may hold; others take none."""

OPTION_WORDS: Mapping[str, frozenset[str]] = {
    "proj_type": frozenset({"std", "reverse_std", "right", "left", "full"}),
    "proj": frozenset({"random", "svd"}),
    "scale_type": frozenset({"channel", "tensor"}),
}

_ABOVE_0 = frozenset({"rank", "update_proj_gap", "block_size", "t_alpha", "t_beta3"})
"""Options that count something, or that others are divided by."""

_SIGNED = frozenset({"weight_lr_power"})
"""Options that may be below 0."""

SWITCHES = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""LLaMA-Factory's own optimizers: one at most."""

FOR_WHOLE_MATRICES = ("use_galore", "use_apollo", "use_badam", "use_adam_mini")
"""Those that have nothing to save, or no meaning, where an adapter learns."""

PACKAGES: Mapping[str, str] = {
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
    "schedule_free": "schedulefree",
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "use_galore": "galore-torch",
    "use_apollo": "apollo-torch",
    "use_badam": "badam",
    "use_adam_mini": "adam-mini",
}
"""Optimizer, family or switch -> the package that it lives in; the rest is torch's own."""

IN_BITSANDBYTES = ("8bit", "32bit", "_bnb", "ademamix", "galore", "apollo")
"""Parts of the names of optimizers that bitsandbytes computes, or that import it."""


def _pairs(text: str) -> str:
    for pair in text.replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if pair and not (name and equals and value):
            raise refusal("bad_option", f"holds {pair[:60]!r}", "for example rank=64,scale=0.25")
    return text


class OptimizerFields(Spec):
    """What a fine-tune says of the optimizer."""

    optim: Optim = Field("adamw_torch", description="The optimizer, by transformers' name.")
    optim_args: Annotated[Text, AfterValidator(_pairs)] | None = Field(
        None, description="Its options, for example `rank=64,update_proj_gap=100`."
    )
    optim_target_modules: Words | None = Field(
        None, description="Modules that galore and apollo project; `all-linear`, names or a regex."
    )
    use_galore: bool = Field(False, description="GaLore: gradients projected to a low rank.")
    galore_target: Words = Field("all", description="Modules whose gradients are projected.")
    galore_rank: Positive = Field(16, description="Rank of the projection.")
    galore_update_interval: Positive = Field(200, description="Steps between projections.")
    galore_scale: float = Field(2.0, gt=0, le=MOST, description="Scale of the projected update.")
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = Field(
        "std", description="Side of the projection."
    )
    galore_layerwise: bool = Field(False, description="Move each layer within the backward pass.")
    use_apollo: bool = Field(False, description="APOLLO: step sizes from projected gradients.")
    apollo_target: Words = Field("all", description="Modules whose gradients are projected.")
    apollo_rank: Positive = Field(16, description="Rank of the projection.")
    apollo_update_interval: Positive = Field(200, description="Steps between projections.")
    apollo_scale: float = Field(32.0, gt=0, le=MOST, description="Scale of the update.")
    apollo_proj: Literal["svd", "random"] = Field("random", description="How it is projected.")
    apollo_proj_type: Literal["std", "right", "left"] = Field("std", description="Its side.")
    apollo_scale_type: Literal["channel", "tensor"] = Field("channel", description="What scales.")
    apollo_layerwise: bool = Field(False, description="Move each layer within the backward pass.")
    apollo_scale_front: bool = Field(False, description="Scale before the norm is limited.")
    use_badam: bool = Field(False, description="BAdam: a block of layers learns at a time.")
    badam_mode: Literal["layer", "ratio"] = Field("layer", description="Blocks, or a share of all.")
    badam_start_block: int | None = Field(None, ge=0, le=9_999, description="The first block.")
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = Field(
        "ascending", description="Which block follows."
    )
    badam_switch_interval: Positive = Field(50, description="Steps before the next block.")
    badam_update_ratio: float = Field(
        0.05, gt=0, le=1, description="Share that learns, with badam_mode: ratio."
    )
    badam_mask_mode: Literal["adjacent", "scatter"] = Field(
        "adjacent", description="Which entries make that share."
    )
    badam_verbose: int = Field(0, ge=0, le=2, description="How much BAdam prints to the log.")
    use_adam_mini: bool = Field(False, description="Adam-mini: one step size a block.")
    use_muon: bool = Field(False, description="Muon for matrices, AdamW for the rest.")


def family(optim: str) -> str:
    """What an optimizer's options and package are listed under.

    >>> family("galore_adamw_8bit"), family("paged_ademamix_8bit"), family("sgd")
    ('galore', 'ademamix', 'sgd')
    """
    for name in ("galore", "apollo", "ademamix", "schedule_free"):
        if name in optim:
            return name
    return optim


def packages_of(spec: OptimizerFields) -> list[tuple[str, str]]:
    """(field, package) for each package that the optimizer of a spec needs."""
    optim, needed = spec.optim, []
    if package := PACKAGES.get(family(optim)):
        needed.append(("optim", package))
    if optim not in ("adamw_torch_8bit",) and any(part in optim for part in IN_BITSANDBYTES):
        needed.append(("optim", "bitsandbytes"))
    for switch in SWITCHES:
        if getattr(spec, switch) and (package := PACKAGES.get(switch)):
            needed.append((switch, package))
            if switch in ("use_galore", "use_apollo"):
                needed.append((switch, "bitsandbytes"))  # the package imports it
    return needed


def optim_options(text: str | None) -> dict[str, str]:
    """``optim_args`` as names and values; "all-linear" and the like stay texts."""
    pairs = (pair.partition("=") for pair in (text or "").replace(" ", "").split(",") if pair)
    return {name: value for name, _, value in pairs}


def optimizer_clashes(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Optimizers that exclude each other, the way of tuning, or the format of numbers."""
    chosen = [switch for switch in SWITCHES if getattr(spec, switch)]
    for second in chosen[1:]:
        message = f"{chosen[0]} and {second} exclude each other."
        yield problem("conflicting_fields", message, second, "give one of them")
    for switch in chosen[:1]:
        yield from _switch(spec, switch)
    if not chosen:
        yield from _low_rank(spec)
    yield from _loraplus(spec)
    yield from _settings(spec)
    yield from _layerwise(spec, chosen)
    yield from _options(spec)


def _switch(spec: "FinetuneSpec", switch: str) -> Iterator[InputError]:
    kind = spec.finetuning_type
    if switch in FOR_WHOLE_MATRICES and kind not in ("full", "freeze"):
        message = f"{switch} and finetuning_type: {kind} exclude each other."
        hint = "finetuning_type: full or freeze; an adapter learns with optim: adamw_torch"
        yield problem("conflicting_fields", message, switch, hint)
    allowed = PLAIN
    if switch == "use_galore":
        allowed = PLAIN | EIGHT_BIT | {"adafactor"}
    if spec.optim not in allowed:
        message = f"{switch} and optim: {spec.optim} exclude each other."
        hint = f"leave optim out, or one of: {', '.join(sorted(allowed))}"
        yield problem("conflicting_fields", message, "optim", hint)


def _loraplus(spec: "FinetuneSpec") -> Iterator[InputError]:
    if spec.use_muon and spec.loraplus_lr_ratio is not None:
        message = "use_muon and loraplus_lr_ratio exclude each other: Muon scales its own steps."
        yield problem("conflicting_fields", message, "loraplus_lr_ratio", "give one of them")


def _settings(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Values with which an optimizer cannot begin."""
    if spec.use_badam and spec.badam_switch_mode == "fixed" and spec.badam_start_block is None:
        message = "badam_switch_mode: fixed does not say which block learns."
        yield problem("missing_field", message, "badam_start_block", "for example 0")
    if spec.optim in ("schedule_free_adamw", "schedule_free_radam") and spec.adam_beta1 == 0:
        message = f"optim: {spec.optim} divides by adam_beta1."
        yield problem("out_of_range", message, "adam_beta1", "above 0, for example 0.9")


def _low_rank(spec: "FinetuneSpec") -> Iterator[InputError]:
    """GaLore and APOLLO by transformers' names."""
    low_rank = family(spec.optim) in ("galore", "apollo")
    if low_rank and spec.finetuning_type not in ("full", "freeze"):
        message = f"optim: {spec.optim} and finetuning_type: {spec.finetuning_type} exclude "
        message += "each other: an adapter is of low rank already."
        yield problem("conflicting_fields", message, "optim", "adamw_torch, or full tuning")
    if low_rank and spec.optim_target_modules is None:
        message = f"optim: {spec.optim} needs optim_target_modules."
        yield problem("missing_field", message, "optim_target_modules", "for example all-linear")
    if not low_rank and spec.optim_target_modules is not None:
        message = f"optim: {spec.optim} takes no optim_target_modules."
        hint = "leave it out, or optim: galore_adamw or apollo_adamw"
        yield problem("conflicting_fields", message, "optim_target_modules", hint)


def _layerwise(spec: "FinetuneSpec", chosen: list[str]) -> Iterator[InputError]:
    """What moves within the backward pass sees one batch at a time, and no norm of all."""
    field = "optim" if spec.optim.endswith("layerwise") else None
    for switch in chosen:
        name = f"{switch.removeprefix('use_')}_layerwise"
        field = name if getattr(spec, name, False) else field
    if field is None:
        return
    if spec.gradient_accumulation_steps > 1:
        message = f"{field}: layers move within the backward pass, so batches cannot be gathered."
        hint = "gradient_accumulation_steps: 1"
        yield problem("conflicting_fields", message, "gradient_accumulation_steps", hint)
    if spec.stage in ONLINE:
        message = f"{field}: layers move within the backward pass, and a question has many answers."
        yield problem("conflicting_fields", message, field, "leave it out")
    if asked_format(spec) == "fp16":
        message = f"{field}: layers move before the scaled gradients of fp16 can be looked at."
        name = "fp16" if spec.fp16 else "precision"
        yield problem("conflicting_fields", message, name, "bf16: true")


def _options(spec: "FinetuneSpec") -> Iterator[InputError]:
    """Options that the optimizer knows, with values that can be read."""
    kind = family(spec.optim)
    known = OPTIM_OPTIONS.get(kind, {})
    options = optim_options(spec.optim_args)
    if len(options) < sum(bool(pair.strip()) for pair in (spec.optim_args or "").split(",")):
        message = "optim_args gives an option twice."
        yield problem("conflicting_fields", message, "optim_args", "name each option once")
    for name, value in options.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"one of: {', '.join(known)}"
            message = f"optim: {spec.optim} has no option {name[:60]!r}."
            yield problem("unknown_field", message, "optim_args", hint if known else "leave it out")
        elif not _readable(name, value, known[name]):
            message = f"optim_args: {name} = {value[:60]!r} cannot be."
            yield problem("wrong_type", message, "optim_args", _expected(name, known[name]))
        elif not _in_range(name, value, known[name]):
            message = f"optim_args: {name} = {value[:60]!r} is out of range."
            least = "above 0" if name in _ABOVE_0 else "0 or above"
            yield problem("out_of_range", message, "optim_args", least)
    yield from _nesterov(options)


def _nesterov(options: Mapping[str, str]) -> Iterator[InputError]:
    """torch's rule: it looks ahead along a momentum that nothing dampens."""
    if options.get("nesterov", "").lower() not in ("true", "1", "yes"):
        return
    if options.get("momentum", "0").strip("0.") == "" or "dampening" in options:
        message = "optim_args: nesterov needs a momentum above 0, and no dampening."
        hint = "for example nesterov=true,momentum=0.9"
        yield problem("conflicting_fields", message, "optim_args", hint)


def _readable(name: str, value: str, kind: type) -> bool:
    if kind is bool:
        return value.lower() in ("true", "false", "1", "0", "yes", "no")
    if kind is str:
        return value in OPTION_WORDS[name]
    try:
        return math.isfinite(kind(value))
    except (ValueError, OverflowError):
        return False


def _in_range(name: str, value: str, kind: type) -> bool:
    """Whether a number that can be read can also be used."""
    if kind in (bool, str) or name in _SIGNED:
        return True
    number = float(value)
    return number > 0 if name in _ABOVE_0 else number >= 0


def _expected(name: str, kind: type) -> str:
    if kind is str:
        return f"one of: {', '.join(sorted(OPTION_WORDS[name]))}"
    return {int: "a whole number", float: "a number", bool: "true or false"}[kind]
