"""What learned, in files: the adapter in peft's format, and all that a resumed run needs beside.

Where peft's format says all (LoRA, OFT, VeRA, IA3, prefix and prompt tuning) a checkpoint holds
that alone. Else (weights of the base, adalora, p-tuning, sums) the very parameters stand in a file
of their own beside it: peft cuts adalora's ranks and keeps only what p-tuning's encoder says.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuneyard.runners.adapter import trained_parameters
from tuneyard.runners.allocation import allocation_of
from tuneyard.runners.beginnings import summands_of
from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.origin import CONFIG_FILE, WEIGHTS_FILE
from tuneyard.runners.summing import Summand, adapter_state, summed

TRAINED_FILE = "trained.safetensors"
ALLOCATION_FILE = "allocation.safetensors"

_WHOLLY_IN_PEFTS_FORMAT = {
    PeftType.LORA,
    PeftType.OFT,
    PeftType.VERA,
    PeftType.IA3,
    PeftType.PREFIX_TUNING,
    PeftType.PROMPT_TUNING,
}


def is_adapter(model: Any) -> bool:
    """Whether an adapter learns, not the base's own weights."""
    return hasattr(model, "peft_config")


def save_learned(model: Any, folder: Path, *, base_id: str) -> None:
    """What a checkpoint keeps of the model; equal ones give equal bytes."""
    if is_adapter(model):
        save_adapter(model, folder, base_id=base_id)
    if not _in_pefts_format(model):
        tensors = {name: _plain_tensor(p) for name, p in trained_parameters(model).items()}
        _write(dict(sorted(tensors.items())), folder / TRAINED_FILE)
    if (allocation := allocation_of(model)) is not None:
        tensors, texts = allocation.state()
        _write(tensors, folder / ALLOCATION_FILE, texts)


def restore_learned(model: Any, folder: Path) -> None:
    """Take what learned from a checkpoint. Raises: BadSpec when it does not fit."""
    if _in_pefts_format(model):
        restore_adapter(model, folder)
        return
    tensors = load_file(folder / TRAINED_FILE) if (folder / TRAINED_FILE).exists() else {}
    learning = trained_parameters(model)
    if shapes(tensors) != shapes(learning):
        raise _unfit()
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(tensors[name])
    if (allocation := allocation_of(model)) is not None:
        with safe_open(folder / ALLOCATION_FILE, framework="pt") as file:
            texts = file.metadata()
        allocation.restore(load_file(folder / ALLOCATION_FILE), texts)


def _in_pefts_format(model: Any) -> bool:
    if not is_adapter(model) or summands_of(model):
        return False
    return model.peft_config["default"].peft_type in _WHOLLY_IN_PEFTS_FORMAT


def save_adapter(model: Any, folder: Path, *, base_id: str) -> None:
    """Write the adapter in peft's format; equal adapters give equal bytes.

    base_id stands where peft would write the path that the base happened to be loaded from. An
    adapter over others, or over a base without its largest part, is written with these as one.
    """
    config, tensors = adapter_state(model)
    if summands := summands_of(model):
        dropout = {"lora_dropout": config["lora_dropout"]}
        config, tensors = summed([Summand(1.0, config, tensors), *summands])
        config |= dropout
    _write(tensors, folder / WEIGHTS_FILE)
    config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    text = json.dumps(_plain(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def restore_adapter(model: Any, folder: Path) -> None:
    """Take an adapter's tensors from a folder. Raises: BadSpec when they do not fit."""
    tensors = load_file(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).exists() else {}
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if shapes(tensors) != shapes(wanted):
        raise _unfit()
    set_peft_model_state_dict(model, tensors)


def load_adapter(base: Any, adapter: Path, *, learns: bool = False) -> Any:
    """An adapter's folder over a base, every tensor in its place. Raises: BadData."""
    try:
        with warnings.catch_warnings():
            # adalora's rank_pattern names tensors, where peft looks for modules.
            warnings.filterwarnings(
                "ignore", message=".*rank_pattern keys", category=RuntimeWarning
            )
            model = PeftModel.from_pretrained(
                base, str(adapter), is_trainable=learns, local_files_only=True
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        message = f"peft cannot put this adapter onto the base: {error}"
        raise BadData(message[:1000], field="adapter") from None
    found = shapes(load_file(adapter / WEIGHTS_FILE))
    if found != shapes(get_peft_model_state_dict(model, save_embedding_layers=False)):
        message = "The adapter's tensors are not those that its configuration speaks of."
        raise BadData(message, field="adapter")
    return model


def _unfit() -> BadSpec:
    return BadSpec(
        "The checkpoint holds another adapter than the arguments ask for.",
        field="lora_rank",
        hint="keep rank and targets as they were, or start from scratch",
    )


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _write(
    tensors: Mapping[str, torch.Tensor], path: Path, texts: Mapping[str, str] | None = None
) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt", **(texts or {})})
    path.chmod(0o644)  # safetensors makes it 0600


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _plain(value: Any) -> Any:
    """As JSON has it; sets in order, for their own differs from process to process."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)
