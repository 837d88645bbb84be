"""From arguments to what moves the parameters: groups, rates, and each optimizer's class."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tuneyard.runners.adapter import decaying_names, parameter_groups, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.mover import Blocks, Mover, ScheduleFree, Shares
from tuneyard.runners.schedules import BY_EVALUATION, Schedule, schedule, warmup_steps
from tuneyard.specs.optimizers import OPTIM_OPTIONS, PLAIN, SWITCHES, family, optim_options

Group = dict[str, Any]
Named = Mapping[str, torch.nn.Parameter]


def build_mover(
    model: Any, arguments: FinetuneArguments, *, warmup_steps: int, device: str
) -> Mover:
    """The optimizer that was asked for, over all that learns. Raises: BadSpec."""
    rate = arguments.learning_rate
    about: dict[str, Any] = {"learn": trained_parameters(model), "rate": rate, "device": device}
    switch = next((name for name in SWITCHES if getattr(arguments, name)), None)
    if switch is not None:
        return _BY_SWITCH[switch](model, arguments, about)
    if arguments.optim in PLAIN:
        part = _adamw(parameter_groups(model, arguments), arguments, device)
        return Mover(model, [part], **about)
    parts, within = _as_transformers(model, arguments, warmup_steps)
    kind = ScheduleFree if family(arguments.optim) == "schedule_free" else Mover
    return kind(model, parts, within_backward=within, **about)


def schedule_of(arguments: FinetuneArguments, steps: int) -> Schedule:
    """The learning rate of each step."""
    options = dict(arguments.lr_scheduler_kwargs or {})
    if arguments.lr_scheduler_type in BY_EVALUATION and arguments.greater_is_best:
        options.setdefault("mode", "max")
    return schedule(
        arguments.lr_scheduler_type,
        warmup=warmup_of(arguments, steps),
        total=steps,
        learning_rate=arguments.learning_rate,
        options=options,
    )


def warmup_of(arguments: FinetuneArguments, steps: int) -> int:
    """How many of a run's steps warm up."""
    return warmup_steps(steps, steps=arguments.warmup_steps, ratio=arguments.warmup_ratio)


def warnings_about(arguments: FinetuneArguments) -> Iterator[str]:
    """What a person may expect of an optimizer, and it does not do."""
    kind = family(arguments.optim)
    if kind in ("galore", "apollo") and arguments.weight_decay:
        yield f"{arguments.optim} takes no weight_decay, as in transformers: nothing decays."
    if kind == "schedule_free" and not arguments.lr_scheduler_type.startswith("constant"):
        yield (
            f"{arguments.optim} is made for lr_scheduler_type: constant, and the rate follows "
            f"{arguments.lr_scheduler_type} here."
        )
    within = arguments.optim.endswith("layerwise")
    if within or arguments.galore_layerwise or arguments.apollo_layerwise:
        yield "Layers move within the backward pass: gradients are not clipped, their norm reads 0."


def _split(learn: Named, decay: set[str], weight_decay: float, **more: Any) -> list[Group]:
    groups: list[Group] = [
        {"params": [p for n, p in learn.items() if n in decay], "weight_decay": weight_decay},
        {"params": [p for n, p in learn.items() if n not in decay], "weight_decay": 0.0},
    ]
    return [group | more for group in groups if group["params"]]


def _adamw(
    groups: Sequence[Group], arguments: FinetuneArguments, device: str
) -> torch.optim.Optimizer:

    return torch.optim.AdamW(
        list(groups),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        fused=device == "cuda" or arguments.optim == "adamw_torch_fused",
    )


def _as_transformers(
    model: Any, arguments: FinetuneArguments, warmup_steps: int
) -> tuple[list[torch.optim.Optimizer], bool]:
    """By transformers' own table of optimizers. True: one for each parameter, within backward."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames, ParallelMode

    targets = arguments.optim_target_modules
    asked: Any = SimpleNamespace(
        optim=OptimizerNames(arguments.optim),
        optim_args=arguments.optim_args,
        optim_target_modules=_modules(targets),
        learning_rate=arguments.learning_rate,
        adam_beta1=arguments.adam_beta1,
        adam_beta2=arguments.adam_beta2,
        adam_epsilon=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        warmup_steps=warmup_steps,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        parallel_mode=ParallelMode.NOT_PARALLEL,
    )
    if arguments.optim.startswith("galore_adamw_8bit"):
        _check_galore_8bit(model, "optim")
    if arguments.optim in ("adamw_torch_4bit", "adamw_torch_8bit") and not shutil.which("cc"):
        message = f"{arguments.optim} compiles its steps, and this node has no C compiler."
        raise BadSpec(message, field="optim", hint="`apt install build-essential`, or adamw_8bit")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(asked, model)
    except ValueError as error:  # no module has such a name
        raise BadSpec(str(error), field="optim_target_modules", hint="such as all-linear") from None
    options |= _typed_options(arguments, options)
    if arguments.optim == "stable_adamw":
        options["triton"] = False  # its kernel adds by atomics, each time in another order
    if "optimizer_dict" in options:
        learn = set(trained_parameters(model).values())
        parts = [part for p, part in options["optimizer_dict"].items() if p in learn]
        return [_mended(part) for part in parts], True
    groups = options.pop("params", None) or parameter_groups(model, arguments)
    if "optim_bits" in options and options["optim_bits"] == 8:
        _embeddings_in_32_bit(model)
    return [_mended(kind(groups, **options))], False


def _modules(targets: Any) -> Any:
    """Names as a list: transformers reads a text as a regex, or as all-linear."""
    names = isinstance(targets, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets)
    if not names or targets == "all_linear":
        return targets
    return [name.strip() for name in targets.split(",")]


def _typed_options(arguments: FinetuneArguments, options: Mapping[str, Any]) -> dict[str, Any]:
    """transformers hands some options on as texts, of which "false" is true."""
    kinds = OPTIM_OPTIONS.get(family(arguments.optim), {})
    return {
        name: value.lower() in ("true", "1", "yes") if kinds[name] is bool else kinds[name](value)
        for name, value in optim_options(arguments.optim_args).items()
        if name in options and kinds.get(name) in (bool, int)
    }


def _embeddings_in_32_bit(model: Any) -> None:
    """As transformers has it: 8 bits are too few for rows that seldom move."""
    from bitsandbytes import optim

    manager: Any = getattr(optim, "GlobalOptimManager").get_instance()  # noqa: B009 - it has no types
    manager.initialize()  # it knows parameters by their ids, of runs before this one too
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _projected(model: Any, targets: str | Sequence[str], field: str) -> set[torch.nn.Parameter]:
    """Matrices whose gradients are projected. Raises: BadSpec when no module is meant."""

    output = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    names = [name.strip() for name in names if name.strip()]
    everything = names in (["all"], ["all-linear"])
    found = {
        parameter
        for name, module in linear.items()
        if everything or any(target in name for target in names)
        for parameter in module.parameters()
        if parameter.requires_grad and parameter.ndim > 1
    }
    if not found:
        known = sorted({name.rpartition(".")[2] for name in linear})
        message = f"No module that learns is named {', '.join(names)}."
        raise BadSpec(message, field=field, hint=f"all, or of: {', '.join(known)}")
    return found


def _galore(model: Any, arguments: FinetuneArguments, about: dict[str, Any]) -> Mover:
    import galore_torch

    kinds = {"adafactor": galore_torch.GaLoreAdafactor} | dict.fromkeys(
        PLAIN, galore_torch.GaLoreAdamW
    )
    kind = kinds.get(arguments.optim, galore_torch.GaLoreAdamW8bit)
    projection = {
        "rank": arguments.galore_rank,
        "update_proj_gap": arguments.galore_update_interval,
        "scale": arguments.galore_scale,
        "proj_type": arguments.galore_proj_type,
    }
    options = _plain_options(arguments)
    if kind is galore_torch.GaLoreAdamW8bit:
        _check_galore_8bit(model, "use_galore")
    if kind is galore_torch.GaLoreAdafactor:
        rate = arguments.learning_rate
        options = {"lr": rate, "scale_parameter": False, "relative_step": False}
    elif kind is galore_torch.GaLoreAdamW:
        options["no_deprecation_warning"] = True
    projected = _projected(model, arguments.galore_target, "galore_target")
    within = arguments.galore_layerwise
    return _low_rank(model, arguments, about, kind, options, projected, projection, within)


def _apollo(model: Any, arguments: FinetuneArguments, about: dict[str, Any]) -> Mover:
    from apollo_torch import APOLLOAdamW

    projection = {
        "rank": arguments.apollo_rank,
        "proj": arguments.apollo_proj,
        "proj_type": arguments.apollo_proj_type,
        "update_proj_gap": arguments.apollo_update_interval,
        "scale": arguments.apollo_scale,
        "scale_type": arguments.apollo_scale_type,
    }
    options = _plain_options(arguments) | {"scale_front": arguments.apollo_scale_front}
    projected = _projected(model, arguments.apollo_target, "apollo_target")
    within = arguments.apollo_layerwise
    return _low_rank(model, arguments, about, APOLLOAdamW, options, projected, projection, within)


def _check_galore_8bit(model: Any, field: str) -> None:
    if next(model.parameters()).device.type == "cpu":
        message = "GaLore with moments in 8 bit needs a GPU."
        raise BadSpec(message, field=field, hint="GaLore with adamw_torch or adafactor")


def _mended(part: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """galore-torch hands bitsandbytes two options that meanwhile mean something else there.

    Its percentile would be a bound of updates by the norm of weights, which it sets to 0: what has
    moments in 32 bit, being small, would hardly move.
    """
    if type(part).__module__ == "galore_torch.adamw8bit":
        args: Any = part.args  # type: ignore[attr-defined]
        args.max_unorm, args.skip_zeros = 0.0, False
    return part


def _plain_options(arguments: FinetuneArguments) -> dict[str, Any]:
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


def _low_rank(
    model: Any,
    arguments: FinetuneArguments,
    about: dict[str, Any],
    kind: Any,
    options: dict[str, Any],
    projected: set[torch.nn.Parameter],
    projection: dict[str, Any],
    within: bool,
) -> Mover:
    """Projected matrices in a group of their own; within the backward pass one for each."""
    learn, decay = trained_parameters(model), decaying_names(model)
    others = {name: p for name, p in learn.items() if p not in projected}
    matrices = [p for p in learn.values() if p in projected]
    weight_decay = arguments.weight_decay
    groups = _split(others, decay, weight_decay)
    groups.append({"params": matrices, "weight_decay": weight_decay, **projection})
    if not within:
        return Mover(model, [_mended(kind(groups, **options))], **about)
    parts = [
        _mended(kind([{**group, "params": [parameter]}], **options))
        for group in groups
        for parameter in group["params"]
    ]
    for part in parts:
        part.param_groups[0]["params"][0].register_post_accumulate_grad_hook(_stepping(part))
    return Mover(model, parts, within_backward=True, **about)


def _stepping(part: torch.optim.Optimizer) -> Any:
    def step(_: object) -> None:
        part.step()
        part.zero_grad()

    return step


def _badam(model: Any, arguments: FinetuneArguments, about: dict[str, Any]) -> Mover:
    from badam import BlockOptimizer, BlockOptimizerRatio

    groups, named = parameter_groups(model, arguments), list(model.named_parameters())
    if arguments.badam_mode == "ratio":
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            message = "badam_mode: ratio cannot tell tied embeddings apart."
            raise BadSpec(message, field="badam_mode", hint="badam_mode: layer")
        part = BlockOptimizerRatio(
            groups,
            named,
            update_ratio=arguments.badam_update_ratio,
            mask_mode=arguments.badam_mask_mode,
            verbose=arguments.badam_verbose,
            include_embedding=False,
            **_plain_options(arguments),
        )
        about["learn"] = trained_parameters(model)
        return Shares(model, [part], **about)
    base = _adamw(groups, arguments, about["device"])
    try:
        block = BlockOptimizer(
            base,
            named,
            switch_block_every=arguments.badam_switch_interval,
            start_block=arguments.badam_start_block,
            switch_mode=arguments.badam_switch_mode,
            verbose=arguments.badam_verbose,
        )
    except IndexError:
        message = f"The model has no block {arguments.badam_start_block}."
        raise BadSpec(message, field="badam_start_block", hint="blocks count from 0") from None
    inside = {n for n in about["learn"] if any(p[0] in n for p in block.block_prefix_list)}
    about["learn"] = {name: p for name, p in about["learn"].items() if name in inside}
    return Blocks(model, [block], **about)


def _adam_mini(model: Any, arguments: FinetuneArguments, about: dict[str, Any]) -> Mover:
    from adam_mini import Adam_mini

    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    part = Adam_mini(
        named_parameters=list(trained_parameters(model).items()),
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        lr=arguments.learning_rate,
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        dim=width,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        verbose=False,
    )
    for name, parameter in trained_parameters(model).items():
        of_heads = "bias" not in name and any(each in name for each in part.wqk_names)
        if of_heads and parameter.numel() % part.head_numel:
            message = f"use_adam_mini cannot divide {name} into heads of {part.head_numel} numbers."
            raise BadSpec(message, field="use_adam_mini", hint="optim: adamw_torch")
    part.world_size = 1
    return Mover(model, [part], **about)


def _muon(model: Any, arguments: FinetuneArguments, about: dict[str, Any]) -> Mover:
    """Muon for the matrices within the layers, AdamW for embeddings, output and vectors.

    Source: Muon is Scalable for LLM Training (arXiv 2502.16982), whose scale of updates
    LLaMA-Factory uses too.
    """

    if not hasattr(torch.optim, "Muon"):
        message = f"use_muon needs torch 2.9, and this node's runner has {torch.__version__}."
        raise BadSpec(message, field="use_muon", hint="optim: adamw_torch")
    learn = trained_parameters(model)
    matrices = [
        p for n, p in learn.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    moved = set(matrices)
    others = {name: p for name, p in learn.items() if p not in moved}
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(
                matrices,
                lr=arguments.learning_rate,
                weight_decay=arguments.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if groups := _split(others, decaying_names(model), arguments.weight_decay):
        parts.append(_adamw(groups, arguments, about["device"]))
    return Mover(model, parts, **about)


_BY_SWITCH = {
    "use_galore": _galore,
    "use_apollo": _apollo,
    "use_badam": _badam,
    "use_adam_mini": _adam_mini,
    "use_muon": _muon,
}
