"""What each tensor of a merged model is made of, decided from headers alone. No torch.

Source of what an adapter's names and scale mean: peft 0.21, tuners/lora/layer.py and
utils/save_and_load.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuneyard.runners.failures import BadData
from tuneyard.runners.tensor_files import FLOATS, FORMATS, Tensor
from tuneyard.store.safetensors import DTYPE_BITS, product

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names on disk of the two ends, which may be one tensor."""

_PREFIX = "base_model.model."
_HALVES = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}

_HARMLESS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path exclude_modules inference_mode
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save
    peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type
    use_rslora
    """.split()  # noqa: SIM905 - reads best as text
)
"""Names of adapter_config.json that are honoured here, or say nothing about merging."""

_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
"""Values at which a name says nothing about merging; empty ones never do."""


class WholeModelNeeded(Exception):
    """This adapter is merged by peft, with the whole model in memory; the text says why."""


@dataclass(frozen=True)
class Pair:
    """Two factors, a: [rank, columns] and b: [rows, rank]; for an embedding b @ a is transposed."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of what is added; None where the factors do not fit each other."""
        a, b = self.a.shape, self.b.shape
        plain = {self.a.dtype, self.b.dtype} <= FLOATS.keys()
        if not plain or not len(a) == len(b) == 2 or b[1] != a[0]:
            return None
        return (a[1], b[0]) if self.embedding else (b[0], a[1])


@dataclass(frozen=True)
class Part:
    """One tensor of the result: ``source``, converted to ``dtype``, plus a pair if there is one."""

    name: str
    source: Tensor
    dtype: str
    pair: Pair | None = None

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return DTYPE_BITS[self.dtype] * product(list(self.source.shape)) // 8


@dataclass(frozen=True)
class Plan:
    """All parts in order. untied: the two ends are one tensor in the base and two here."""

    parts: Sequence[Part]
    pairs: int
    untied: bool


def plan_merge(
    weights: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    dtype: str | None,
) -> Plan:
    """Match an adapter's tensors with the base's. dtype: torch's name; None keeps each as it is.

    Raises: WholeModelNeeded, BadData when the adapter was not made for this base.
    """
    _check_plain(adapter_config)
    pairs = _pairs(adapter, adapter_config)
    whole = _replacements(adapter)
    sources, changed = dict(weights), pairs.keys() | whole.keys()
    untied = is_tied(config, weights) and bool({EMBEDDING, HEAD} & changed)
    if untied and EMBEDDING in weights:
        sources[HEAD] = replace(weights[EMBEDDING], name=HEAD)
    if missing := sorted(changed - sources.keys()):
        raise WholeModelNeeded(f"the base's files have no tensor {missing[0][:80]!r}")
    parts = [
        _part(name, source, pair=pairs.get(name), instead=whole.get(name), dtype=dtype)
        for name, source in sources.items()
    ]
    return Plan(parts, len(pairs), untied)


def is_tied(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the base uses its input embedding as its output layer as well."""
    return bool(config.get("tie_word_embeddings", HEAD not in weights))


def _check_plain(config: Mapping[str, Any]) -> None:
    """Raises: WholeModelNeeded for what is more than a sum of plain factors."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise WholeModelNeeded(f"it is of type {config.get('peft_type')}")
    for name, value in config.items():
        if name not in _HARMLESS and value and value not in _PLAIN.get(name, ()):
            raise WholeModelNeeded(f"{name} is {value!r}"[:200])


def _pairs(adapter: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Pair]:
    """Name of the base's tensor -> what is added to it."""
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for name, tensor in adapter.items():
        for suffix, (half, embedding) in _HALVES.items():
            if name.endswith(suffix):
                module = _module(name.removesuffix(suffix))
                halves.setdefault(module, {})[half] = tensor
                embeddings |= {module} if embedding else set()
    found = {}
    for module, factors in halves.items():
        if factors.keys() != {"a", "b"}:
            raise BadData(f"The adapter has one half of {module[:80]!r} only.", field="adapter")
        a, b = factors["a"], factors["b"]
        scale = scale_of(module, config, rank=a.shape[0] if a.shape else 0)
        found[f"{module}.weight"] = Pair(a, b, scale, module in embeddings)
    return found


def _replacements(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of the base's tensor -> the one that learned as a whole in its place."""
    return {
        _module(name): tensor
        for name, tensor in adapter.items()
        if not any(name.endswith(suffix) for suffix in _HALVES)
    }


def _module(name: str) -> str:
    if not name.startswith(_PREFIX) or "lora_" in name:
        raise WholeModelNeeded(f"the adapter has a tensor {name[:80]!r}")
    return name.removeprefix(_PREFIX)


def scale_of(module: str, config: Mapping[str, Any], *, rank: int) -> float:
    """What the product is multiplied by. Raises: BadData when config and tensors disagree."""
    said = _number(module, config, "rank_pattern", "r")
    alpha = _number(module, config, "alpha_pattern", "lora_alpha")
    if said != rank:
        message = f"{module[:80]!r} has rank {rank}, and adapter_config.json says {said:g}."
        raise BadData(message, field="adapter")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(module: str, config: Mapping[str, Any], patterns: str, name: str) -> float:
    """A value for one module: that of the first pattern that ends its name, else the general."""
    value = config.get(name)
    for pattern, special in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise BadData(f"adapter_config.json: {name} = {value!r} is no number.", field="adapter")
    return value


def _part(
    name: str, source: Tensor, *, pair: Pair | None, instead: Tensor | None, dtype: str | None
) -> Part:
    kept = source.dtype if dtype is None or source.dtype not in FLOATS else FORMATS[dtype]
    if instead is not None:
        if instead.shape != source.shape or instead.dtype not in FLOATS or kept not in FLOATS:
            raise _unfit(name, instead, source)
        return Part(name, instead, kept)
    if pair is not None and (pair.shape != source.shape or source.dtype not in FLOATS):
        raise _unfit(name, pair.a, source)
    return Part(name, source, kept, pair)


def _unfit(name: str, tensor: Tensor, source: Tensor) -> BadData:
    shapes = f"{list(tensor.shape)} of the adapter, {source.dtype} {list(source.shape)} of the base"
    message = f"The adapter does not fit this base: {name[:80]!r} ({shapes})."
    return BadData(message, field="adapter", hint="merge it onto the base that it was tuned over")
