"""Sums of LoRAs as one: factors side by side, so that the result stands over the untouched base.

A fine-tune over other adapters has them in its base's weights, and PiSSA takes a part out of them;
what it publishes is one plain LoRA that holds all of this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict

from tuneyard.runners.failures import BadData
from tuneyard.runners.merge_plan import scale_of

Tensors = Mapping[str, torch.Tensor]

_PREFIX = "base_model.model."
_HALVES = {  # suffix -> the dimension that the rank is
    ".lora_A.weight": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_A": 0,
    ".lora_embedding_B": 1,
}
_ODD = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class Summand:
    """A LoRA that is added ``times`` times, as its files have it."""

    times: float
    config: Mapping[str, Any]
    tensors: Tensors


def adapter_state(model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of the adapter that learns, as peft has them, on the CPU."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    copied = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    return model.peft_config["default"].to_dict(), copied


def check_summable(config: Mapping[str, Any], tensors: Tensors) -> None:
    """Raises: BadData for an adapter that is more than plain factors."""
    odd = next((name for name in _ODD if config.get(name)), None)
    other = [name for name in tensors if not name.endswith(tuple(_HALVES))]
    kind = config.get("peft_type")
    if getattr(kind, "value", kind) == "LORA" and not odd and not other:
        return
    raise BadData(
        f"It cannot be summed: {(odd or next(iter(other), str(kind)))[:80]}.",
        field="adapter",
        hint="merge it first (`tuneyard merge JOB`), and name the merged model as model",
    )


def summed(parts: Sequence[Summand]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One LoRA of the scale 1 that adds what all parts add. Raises: BadData.

    Where a part leaves a module alone its factors are 0.
    """
    for part in parts:
        check_summable(part.config, part.tensors)
    ranks = [_rank(part) for part in parts]
    modules = sorted({_module(name) for part in parts for name in part.tensors})
    found: dict[str, torch.Tensor] = {}
    for name in sorted({name for part in parts for name in part.tensors}):
        suffix = next(s for s in _HALVES if name.endswith(s))
        shape = next(p.tensors[name].shape for p in parts if name in p.tensors)
        pieces = [
            _piece(part, name, suffix, rank, shape) for part, rank in zip(parts, ranks, strict=True)
        ]
        found[name] = torch.cat(pieces, dim=_HALVES[suffix]).contiguous()
    config = dict(parts[0].config) | {
        "r": sum(ranks),
        "lora_alpha": sum(ranks),
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "target_modules": [module.removeprefix(_PREFIX) for module in modules],
    }
    return config, found


def _piece(part: Summand, name: str, suffix: str, rank: int, shape: Sequence[int]) -> torch.Tensor:
    """A part's factor; B carries the scale and how often it is added."""
    if name not in part.tensors:
        sizes = list(shape)
        sizes[_HALVES[suffix]] = rank
        return torch.zeros(sizes)
    tensor = part.tensors[name].float()
    if tensor.shape[_HALVES[suffix]] != rank:
        raise BadData(f"{name[:80]!r} has another rank than the rest.", field="adapter")
    if "_B" not in suffix:
        return tensor
    scale = scale_of(_module(name).removeprefix(_PREFIX), part.config, rank=rank)
    return tensor * (part.times * scale)


def _rank(part: Summand) -> int:
    name = next(n for n in part.tensors if n.endswith((".lora_A.weight", ".lora_embedding_A")))
    return int(part.tensors[name].shape[0])


def _module(name: str) -> str:
    return next(name.removesuffix(s) for s in _HALVES if name.endswith(s))
