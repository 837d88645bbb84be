"""Attention over a row that holds several examples, each of which sees itself alone.

transformers asks once a forward pass for a mask and hands it to every layer. Here its place is
taken by what tells where each example stands, with the mask that the model's family wants for that
example alone: windows and soft caps stay the family's own affair, and nothing of the size of the
whole row squared is ever made. Where no examples share a row, a model attends as without this
module.

Ways, from what may always be taken to what is fastest:

padded      a row for each example, filled up to the longest: the reference for the others
segments    one row; the family's own attention is called for each example in it
varlen      one row; torch's variable-length flash attention, on a GPU, in bf16 or fp16
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tuneyard.runners.arguments import Way
from tuneyard.runners.reading import now

FAMILIES = frozenset(
    """
    gemma gemma2 gemma3_text glm glm4 gpt_oss granite llama mistral mixtral olmo2 phi3 qwen2
    qwen2_moe qwen3 qwen3_moe smollm3
    """.split()  # noqa: SIM905 - reads best as text
)
"""Families whose examples were shown to come out of a shared row as they come out of their own.

tests/methods/test_families.py shows it. Others mix tokens by more than attention (convolutions,
states), or have masks that nobody has tried here.
"""


@dataclass(frozen=True)
class Choice:
    """How a model attends. why: what stands against a faster way, in words; None: nothing."""

    way: Way
    why: str | None = None


def choose_way(
    model: Any, *, device: str, wanted: Way | None = None, computed: torch.dtype | None = None
) -> Choice:
    """The fastest way that this model, device and torch are known to compute rightly.

    wanted: take this one; where it cannot be, the plain one, saying why. computed: the format that
    products are computed in, where it is not that of the weights.
    """
    if wanted == "padded":
        return Choice("padded")
    if against := _against_sharing(model):
        return Choice("padded", against)
    if wanted == "segments" or (wanted is None and device == "cpu"):
        return Choice("segments")
    if against := _against_varlen(model, device, computed):
        return Choice("padded", against)
    return Choice("varlen")


def attend_by(model: Any, way: Way) -> None:
    """Have a model, wrapped by an adapter or not, attend in a way."""
    bare = _bare(model)
    if way != "padded":
        bare.set_attn_implementation(_name(way, _plain(bare)))


def _name(way: Way, plain: str) -> str:
    """What transformers knows it by, over the family's own attention."""
    return f"tuneyard_{way}_{plain}"


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain(bare: Any) -> str:
    """The attention that a model was loaded with: sdpa, or its family's own."""
    name: str = bare.config._attn_implementation
    return name.rpartition("_")[2]


def _against_sharing(model: Any) -> str | None:
    """Why examples of this model may not share a row."""
    adapters = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in adapters):
        return "virtual tokens stand before each example"
    bare = _bare(model)
    family = bare.config.model_type
    if family not in FAMILIES:
        return f"the family {family} has not been shown to allow it"
    if getattr(bare, "is_loaded_in_8bit", False):
        return "products in 8 bits depend on all rows of a group"
    if kind := _rope_of_the_longest(bare.config):
        return f"{kind} positions depend on the longest example of a group"
    if _plain(bare) not in ("sdpa", "eager"):
        return f"its attention is {bare.config._attn_implementation}"
    return None


def _rope_of_the_longest(config: Any) -> str | None:
    """The kind of rotary positions that are stretched by the longest row, if these are such."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    kinds = {one.get("rope_type") for one in each} & {"dynamic", "longrope"}
    return next(iter(kinds), None)


def _against_varlen(model: Any, device: str, computed: torch.dtype | None) -> str | None:
    """Why torch's variable-length attention cannot compute this model."""
    bare = _bare(model)
    config = bare.config
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    known = _varlen_parameters()
    if device != "cuda":
        return "variable-length attention needs a GPU"
    if not known:
        return f"torch {torch.__version__} has no variable-length attention"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no flash attention"
    if _plain(bare) != "sdpa":
        return "soft caps and sinks need the family's own attention"
    if (computed or bare.dtype) not in (torch.bfloat16, torch.float16):
        return "variable-length attention needs bf16 or fp16"
    if head_dim > 256 or head_dim % 8:
        return f"heads of {head_dim} numbers do not fit flash attention"
    if "window_size" not in known and _has_window(config):
        return f"variable-length attention of torch {torch.__version__} has no windows"
    if getattr(config, "attention_dropout", 0.0):
        return "variable-length attention has no dropout"
    return None


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds


def _varlen_parameters() -> frozenset[str]:
    """What torch's variable-length attention takes; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True)
class Segments:
    """In a mask's place: where each example stands, and what it sees; None: all before itself."""

    bounds: Sequence[tuple[int, int]]
    masks: Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Varlen:
    """In a mask's place: where examples end (int32), the longest, and how far each token sees."""

    ends: torch.Tensor
    longest: int
    window: int | None


def _make_segments(plain: str, sizes: Sequence[int], asked: Mapping[str, Any]) -> Segments:
    """The family's mask for each example, as if the others were not there."""
    ends = list(itertools.accumulate(sizes))
    bounds = list(zip([0, *ends], ends, strict=False))
    return Segments(bounds, [_mask_between(plain, asked, *each) for each in bounds])


def _mask_between(
    plain: str, asked: Mapping[str, Any], start: int, end: int
) -> torch.Tensor | None:
    length = end - start
    here = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
    make = ALL_MASK_ATTENTION_FUNCTIONS[plain]
    mask: torch.Tensor = make(**{**asked, **here, "allow_is_causal_skip": False})
    if plain == "sdpa" and bool((mask == torch.ones_like(mask).tril()).all()):
        return None  # sdpa then takes its own causal way, which is faster
    return mask


def _make_varlen(sizes: Sequence[int], asked: Mapping[str, Any]) -> Varlen:
    ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return Varlen(ends.to(asked["device"]), max(sizes), asked.get("local_size"))


Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def _plain_attention(plain: str, module: torch.nn.Module) -> Attention:
    if plain == "eager":
        found: Attention = sys.modules[type(module).__module__].eager_attention_forward
        return found
    return ALL_ATTENTION_FUNCTIONS[plain]  # type: ignore[no-any-return]


def _attend(
    plain: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query, key, value: [rows, heads, time, dim]; returns [rows, time, heads, dim]."""
    if isinstance(attention_mask, Varlen):
        return _varlen(query, key, value, attention_mask, more.get("scaling")), None
    attention = _plain_attention(plain, module)
    if not isinstance(attention_mask, Segments):
        return attention(module, query, key, value, attention_mask, **more)
    parts = [
        attention(
            module,
            *(each[:, :, start:end] for each in (query, key, value)),
            attention_mask=mask,
            **more,
        )[0]
        for (start, end), mask in zip(attention_mask.bounds, attention_mask.masks, strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    where: Varlen,
    scaling: float | None,
) -> torch.Tensor:
    """[1, heads, time, dim] each; returns [1, time, heads, dim]."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    usual = query.shape[-1] ** -0.5
    if scaling is not None and scaling != usual and "scale" not in known:
        query = query * (scaling / usual)
    if "enable_gqa" not in known:
        times = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
    # Rotary positions may leave query and key in fp32, which flash attention does not take.
    heads = [each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value)]
    left = -1 if where.window is None else where.window - 1  # torch's window leaves out the token
    options: dict[str, Any] = {
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        **({"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}),
    }
    options = {name: value for name, value in options.items() if name in known}
    attend: Any = varlen_attn  # its arguments differ from torch to torch
    longest = where.longest
    attended: torch.Tensor = attend(*heads, where.ends, where.ends, longest, longest, **options)
    return attended[None]


def _register(way: Way, plain: str) -> None:
    """Make a way known to transformers."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _attend(plain, module, query, key, value, attention_mask, **more)

    def mask(**asked: Any) -> Any:
        read = now()
        if read is None or read.sizes is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[plain](**asked)
        if way == "varlen":
            return _make_varlen(read.sizes, asked)
        return _make_segments(plain, read.sizes, asked)

    ALL_ATTENTION_FUNCTIONS.register(_name(way, plain), attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name(way, plain), mask)


_register("segments", "sdpa")
_register("segments", "eager")
_register("varlen", "sdpa")
