"""LoRA on a base model: where it is put, how it begins, how it is written."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.origin import CONFIG_FILE, WEIGHTS_FILE
from tuneyard.runners.precision import Precision
from tuneyard.runners.seeds import stream_seed

SCORE_HEAD = "score"
"""What transformers calls the head of a model that scores sequences."""

SCORE_STD = 0.02
"""Its head's deviation at the start: transformers' usual initializer_range."""


def add_adapter(base: Any, arguments: FinetuneArguments, *, seed: int, precision: Precision) -> Any:
    """Wrap a base with a fresh adapter that changes nothing yet. Raises: BadSpec."""
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=find_targets(base, arguments.lora_target),
        layers_to_transform=arguments.layers_to_transform,
        modules_to_save=_whole_modules(arguments),
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        task_type="SEQ_CLS" if arguments.stage == "rm" else "CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=precision.trained == "float32")
    except ValueError as error:
        raise BadSpec(str(error), field="lora_target") from None
    initialise(model, seed)
    return model


def _whole_modules(arguments: FinetuneArguments) -> list[str] | None:
    """Modules that learn beside the adapter; of a reward model its head always."""
    head = [SCORE_HEAD] if arguments.stage == "rm" else []
    return [*_names(arguments.additional_target), *head] or None


def find_targets(base: Any, asked: str | Sequence[str]) -> list[str]:
    """Names of the modules to adapt; "all" is every linear layer but the output's.

    Raises: BadSpec for a name that no module has, with the nearest.
    """
    output = base.get_output_embeddings() or getattr(base, SCORE_HEAD, None)
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    names = _names(asked)
    if names in (["all"], ["all-linear"]):
        return sorted(linear)
    known = {name.rpartition(".")[2] for name, _ in base.named_modules()} - {""}
    for name in names:
        if name.rpartition(".")[2] not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise BadSpec(
                f"No module of the base is named {name!r}.",
                field="lora_target",
                hint=f"nearest is {near[0]}" if near else f"it has {', '.join(sorted(linear))}",
            )
    return sorted(names)


def _names(value: str | Sequence[str] | None) -> list[str]:
    names = value.split(",") if isinstance(value, str) else list(value or ())
    return [name.strip() for name in names if name.strip()]


def initialise(model: Any, seed: int) -> None:
    """Draw each tensor of the adapter from a stream of its own, in fp32 on the CPU.

    So it begins the same whatever the precision, device, order of modules or layers chosen: peft
    draws from the one global stream and rounds to the base's format.
    Source of the distributions: peft 0.21, tuners/lora/layer.py, reset_lora_parameters.
    """
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.float32)
        stream = torch.Generator().manual_seed(stream_seed(seed, "adapter", name))
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=stream)
        elif ".lora_embedding_B." in name:
            torch.nn.init.normal_(values, generator=stream)
        elif f".{SCORE_HEAD}." in name:
            torch.nn.init.normal_(values, std=SCORE_STD, generator=stream)
        else:
            continue
        with torch.no_grad():
            parameter.copy_(values)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: Any, folder: Path, *, base_id: str) -> None:
    """Write the adapter in peft's format; equal adapters give equal bytes.

    base_id stands where peft would write the path that the base happened to be loaded from.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it 0600
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    text = json.dumps(_plain(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def restore_adapter(model: Any, folder: Path) -> None:
    """Take an adapter's tensors from a folder. Raises: BadSpec when they do not fit."""
    tensors = load_file(folder / WEIGHTS_FILE)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if shapes(tensors) != shapes(wanted):
        raise BadSpec(
            "The checkpoint holds another adapter than the arguments ask for.",
            field="lora_rank",
            hint="keep rank and targets as they were, or start from scratch",
        )
    set_peft_model_state_dict(model, tensors)


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _plain(value: Any) -> Any:
    """As JSON has it; sets in order, for their own differs from process to process."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)
