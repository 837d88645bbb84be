"""Which number formats a run computes in, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuneyard.specs.numbers import Precision as Asked

Format = Literal["float32", "bfloat16", "float16"]
Place = Literal["cpu", "cuda"]

_BY_NAME: dict[str, Format] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Precision:
    """Formats of the frozen weights and of what is trained; ``autocast`` is fp16's on a GPU.

    note: what a person should know about the choice, if anything.
    """

    weights: Format
    trained: Format = "float32"
    autocast: bool = False
    note: str | None = None


def precision_of(
    config: Mapping[str, Any], device: Place, wanted: Asked, *, pure_bf16: bool = False
) -> Precision:
    """What to compute a base in, by its configuration, here."""
    base = config.get("dtype") or config.get("torch_dtype")
    return choose_precision(wanted, base, device, pure_bf16=pure_bf16, has_bf16=has_bf16(device))


def choose_precision(
    precision: Asked,
    base: str | None,
    device: Place,
    *,
    pure_bf16: bool = False,
    has_bf16: bool = True,
) -> Precision:
    """Decide from what was asked, what the base is stored in, and what the device can do.

    auto: the base's own format, but fp32 for one in bf16 where a processor has no bf16 (has_bf16).
    bf16 keeps frozen weights in bf16 and the adapter in fp32, without autocast.
    """
    asked = _BY_NAME.get(precision)
    wanted = asked or (base if base in _BY_NAME.values() else "float32")
    if wanted == "float16" and device == "cpu":
        note = "fp16 does not train on a CPU: computing in fp32." if asked else None
        return Precision("float32", note=note)
    if wanted == "bfloat16" and device == "cpu" and not (asked or has_bf16):
        return Precision("float32")
    if wanted == "bfloat16" and device == "cuda" and not has_bf16:
        return Precision("float16", autocast=True, note="This GPU has no bf16: computing in fp16.")
    if wanted == "float16":
        note = "This GPU has bf16, which needs no loss scaling." if has_bf16 else None
        return Precision("float16", autocast=True, note=note)
    if wanted == "bfloat16":
        note = None if has_bf16 else "This processor has no bf16, and takes many times as long."
        return Precision("bfloat16", trained="bfloat16" if pure_bf16 else "float32", note=note)
    return Precision("float32")


def has_bf16(device: Place) -> bool:
    """Whether the device multiplies bf16 at speed; a CPU without AVX-512 takes many times longer.

    Imports torch.
    """
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    mkldnn: bool = torch.backends.mkldnn.is_available()
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
