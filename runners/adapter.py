"""What learns: an adapter of any type over a frozen base, or weights of the base itself.

How it is chosen stands here and in runners/whole.py, how it begins in runners/beginnings.py, how
it is kept in runners/learned.py.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.beginnings import (
    SCORE_HEAD,
    begin_by_norms,
    begin_by_singular_values,
    initialise,
)
from tuneyard.runners.experts import experts_of
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.precision import Precision
from tuneyard.runners.seeds import stream_seed
from tuneyard.runners.whole import choose_whole, expanded_layers
from tuneyard.specs.fields import words_in
from tuneyard.specs.tuning import WHOLE


def tune(
    base: Any, arguments: FinetuneArguments, *, seed: int, precision: Precision, steps: int = 1000
) -> Any:
    """The model in which what was asked for learns, and nothing else. Raises: BadSpec.

    steps: of the whole run, by which adalora plans.
    """
    if arguments.finetuning_type in WHOLE:
        choose_whole(base, arguments)
        widen(base, precision)
        return base
    return add_adapter(base, arguments, seed=seed, precision=precision, steps=steps)


def add_adapter(
    base: Any, arguments: FinetuneArguments, *, seed: int, precision: Precision, steps: int = 1000
) -> Any:
    """Wrap a base with a fresh adapter that changes nothing yet. Raises: BadSpec.

    Prompt tunings alone do change something from the start: learned vectors stand before the text.
    """
    kind = arguments.finetuning_type
    config = _CONFIGS[kind](base, arguments, stream_seed(seed, "vera"), steps)
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=precision.trained == "float32")
    except ValueError as error:
        raise BadSpec(str(error), field=_FIELDS.get(kind, "finetuning_type")) from None
    initialise(model, seed)
    widen(model, precision)
    begin_by_norms(model)
    if arguments.pissa_init:
        begin_by_singular_values(model, seed, iterations=arguments.pissa_iter)
    if kind in ("p_tuning", "prompt_tuning"):
        _hide_virtual_tokens(model, arguments.num_virtual_tokens)
    return model


def drop_blocks(model: Any) -> None:
    """Let oft's module_dropout leave blocks unturned: peft 0.21 makes its layer and never asks it.

    To be called once, however the adapter came here.
    """
    for module in model.modules():
        for name, rotation in getattr(module, "oft_R", {}).items():
            turn, drop = rotation._cayley_batch, module.oft_dropout[name]
            rotation._cayley_batch = partial(_turned, turn, drop)


def _turned(turn: Any, drop: Any, *asked: Any, **more: Any) -> torch.Tensor:
    blocks: torch.Tensor = drop(turn(*asked, **more))
    return blocks


_FIELDS = {"lora": "lora_target", "oft": "oft_block_size", "adalora": "lora_target"}
"""Type of tuning -> the field that peft's refusals mostly speak of."""


def widen(model: Any, precision: Precision) -> None:
    """What learns is kept in its own format, whatever the frozen weights are in."""
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.to(getattr(torch, precision.trained))


def _lora(base: Any, arguments: FinetuneArguments, _seed: int, _steps: int) -> LoraConfig:
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        **_places(base, arguments),
    )


def _oft(base: Any, arguments: FinetuneArguments, _seed: int, _steps: int) -> OFTConfig:
    return OFTConfig(
        r=arguments.oft_rank,
        oft_block_size=arguments.oft_block_size,
        module_dropout=arguments.module_dropout,
        **_places(base, arguments, target=arguments.oft_target, field="oft_target"),
    )


def _adalora(base: Any, arguments: FinetuneArguments, _seed: int, steps: int) -> AdaLoraConfig:
    """The budget is cut in the middle of the run: after a tenth of it, until its last third.

    Source of the shares: Zhang et al. 2023, arXiv:2303.10512, appendix, rounded.
    """
    return AdaLoraConfig(
        init_r=arguments.adalora_init_rank or (3 * arguments.lora_rank + 1) // 2,
        target_r=arguments.lora_rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        total_step=max(steps, 2),
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 100),
        **_places(base, arguments),
    )


def _vera(base: Any, arguments: FinetuneArguments, seed: int, _steps: int) -> VeraConfig:
    return VeraConfig(
        r=arguments.vera_rank,
        vera_dropout=arguments.lora_dropout,
        projection_prng_key=seed,
        save_projection=True,
        **_places(base, arguments),
    )


def _ia3(base: Any, arguments: FinetuneArguments, _seed: int, _steps: int) -> IA3Config:
    """``all`` means the paper's places: keys, values and the way into the last of a block."""
    family = base.config.model_type
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(family, ["down_proj"])
    targets = words_in(arguments.lora_target)
    if targets in (["all"], ["all-linear"]):
        usual = ["k_proj", "v_proj", "down_proj"]
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family, usual)
    targets = find_targets(base, targets)
    return IA3Config(
        target_modules=targets,
        feedforward_modules=[name for name in targets if name in known],
        modules_to_save=_whole_modules(arguments),
        task_type="SEQ_CLS" if arguments.stage == "rm" else "CAUSAL_LM",
    )


def _prefix(_base: Any, arguments: FinetuneArguments, *_: int) -> PrefixTuningConfig:
    virtual = arguments.num_virtual_tokens
    return PrefixTuningConfig(num_virtual_tokens=virtual, task_type="CAUSAL_LM")


def _p_tuning(base: Any, arguments: FinetuneArguments, *_: int) -> PromptEncoderConfig:
    virtual, width = arguments.num_virtual_tokens, base.get_input_embeddings().embedding_dim
    return PromptEncoderConfig(
        num_virtual_tokens=virtual, encoder_hidden_size=width, task_type="CAUSAL_LM"
    )


def _prompt_tuning(_base: Any, arguments: FinetuneArguments, *_: int) -> PromptTuningConfig:
    virtual = arguments.num_virtual_tokens
    return PromptTuningConfig(num_virtual_tokens=virtual, task_type="CAUSAL_LM")


_CONFIGS: Mapping[str, Callable[..., Any]] = {
    "lora": _lora,
    "oft": _oft,
    "adalora": _adalora,
    "vera": _vera,
    "ia3": _ia3,
    "prefix": _prefix,
    "p_tuning": _p_tuning,
    "prompt_tuning": _prompt_tuning,
}


def _places(
    base: Any,
    arguments: FinetuneArguments,
    *,
    target: str | Sequence[str] | None = None,
    field: str = "lora_target",
) -> dict[str, Any]:
    """Where an adapter is put."""
    layers = arguments.layers_to_transform
    if arguments.use_llama_pro:
        layers = expanded_layers(base, arguments.freeze_trainable_layers)
    return {
        "target_modules": find_targets(base, target or arguments.lora_target, field=field),
        "layers_to_transform": layers,
        "modules_to_save": _whole_modules(arguments),
        "task_type": "SEQ_CLS" if arguments.stage == "rm" else "CAUSAL_LM",
    }


def _whole_modules(arguments: FinetuneArguments) -> list[str] | None:
    """Modules that learn beside the adapter; of a reward model its head always."""
    head = [SCORE_HEAD] if arguments.stage == "rm" else []
    return [*words_in(arguments.additional_target), *head] or None


def find_targets(base: Any, asked: str | Sequence[str], *, field: str = "lora_target") -> list[str]:
    """Names of the modules to adapt; "all" is every linear layer but the output's.

    Raises: BadSpec for a name that no module has, with the nearest.
    """
    output = base.get_output_embeddings() or getattr(base, SCORE_HEAD, None)
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    names = words_in(asked)
    if names in (["all"], ["all-linear"]):
        return sorted(linear)
    known = {name.rpartition(".")[2] for name, _ in base.named_modules()} - {""}
    for name in names:
        if name.rpartition(".")[2] not in known:
            if name.rpartition(".")[2] in experts_of(base):
                raise BadSpec(
                    f"{name} holds all experts of a layer in one tensor: no adapter is put there.",
                    field="lora_target",
                    hint=f"it has {', '.join(sorted(linear))}",
                )
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise BadSpec(
                f"No module of the base is named {name!r}.",
                field=field,
                hint=f"nearest is {near[0]}" if near else f"it has {', '.join(sorted(linear))}",
            )
    return sorted(names)


def _hide_virtual_tokens(model: PeftModel, count: int) -> None:
    """Who asks for logits counts the tokens of the text; the learned ones stand before it."""

    def shift(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_ids") is not None:
            raise RuntimeError("packed rows leave learned vectors no place")
        wanted = kwargs.get("logits_to_keep", 0)
        if isinstance(wanted, torch.Tensor):
            kwargs["logits_to_keep"] = wanted + count
        return args, kwargs

    def cut(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        wanted = kwargs.get("logits_to_keep", 0)
        if isinstance(wanted, int) and not wanted:
            output.logits = output.logits[:, count:]
        return output

    model.register_forward_pre_hook(shift, with_kwargs=True)
    model.register_forward_hook(cut, with_kwargs=True)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Source: transformers 5.23, Trainer.get_decay_parameter_names."""


def decaying_names(model: torch.nn.Module) -> set[str]:
    """Parameters that weight decay draws to 0: neither norms nor biases."""
    norms = {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for inner, _ in module.named_parameters(recurse=False)
    }
    names = {name for name, _ in model.named_parameters()}
    return {name for name in names - norms if not _NOT_DECAYED.search(name.lower())}


def parameter_groups(model: Any, arguments: FinetuneArguments) -> list[dict[str, Any]]:
    """Groups for an optimizer: params, weight_decay, lr, and ``lr_scale``.

    lr_scale: what a step's learning rate is multiplied by for this group; lr is that of the first.
    LoRA+ lets B learn faster than A. Source: Hayou et al. 2024, arXiv:2402.12354; which parameters
    go where: LLaMA-Factory 0.9.5, train/trainer_utils.py.
    """
    found: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    decaying = decaying_names(model)
    for name, parameter in trained_parameters(model).items():
        decays = name in decaying
        scale = _lr_scale(name, parameter, arguments)
        key = (scale, arguments.weight_decay if decays else 0.0)
        found.setdefault(key, []).append(parameter)
    rate = arguments.learning_rate
    return [
        {"params": params, "weight_decay": decay, "lr": rate * scale, "lr_scale": scale}
        for (scale, decay), params in found.items()
    ]


def _lr_scale(name: str, parameter: torch.nn.Parameter, arguments: FinetuneArguments) -> float:
    if arguments.loraplus_lr_ratio is None:
        return 1.0
    if "lora_embedding_B" in name:
        return arguments.loraplus_lr_embedding / arguments.learning_rate
    return arguments.loraplus_lr_ratio if "lora_B" in name or parameter.ndim == 1 else 1.0


def computes_by_casting(model: Any, precision: Precision) -> bool:
    """Whether weights of the base's own modules learn in another format than is computed in."""
    if precision.weights == precision.trained:
        return False
    peft_parts = re.compile(r"lora_|oft_|vera_|ia3_|prompt_encoder")
    return any(not peft_parts.search(name) for name in trained_parameters(model))
