"""What sharing rows is worth and whether it is right: on a GPU in bf16, or on a CPU in fp32.

    PYTHONPATH=src:tests python -P bench/gpu_packing.py [--device cpu] [--steps 20]
        [--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --vocabulary 128256]

First the families of tests/support/families.py: loss and gradients of one step in each way that
can be chosen, beside those of fp32 row by row (bounds: loss 2e-3, cosine of each gradient 0.999 in
bf16; loss 1e-6, gradients 1e-5 relative in fp32). Then a Llama of the given shape with LoRA on all
linear layers, over rows whose lengths are distributed like those of instruction data (log-normal,
mean about 200 tokens, 16 to 750): at each step all ways compute the same rows from one adapter, in
turn, so that what disturbs the machine disturbs all; the plain way then moves it. Prints the
largest difference of the losses, tokens/s (median of the steps; on a CPU of processor time), their
ratio to the plain way's, and peak memory. Exit code 1 where a bound is broken.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from support.families import FAMILIES, WINDOW, a_family_base
from support.gradients import random_examples
from transformers import LlamaConfig, LlamaForCausalLM

from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments, Way
from tuneyard.runners.attention import attend_by, choose_way
from tuneyard.runners.base_model import load_weights, read_config
from tuneyard.runners.batches import collate
from tuneyard.runners.examples import Example
from tuneyard.runners.losses import TokenLoss
from tuneyard.runners.packing import filled_groups
from tuneyard.runners.precision import Precision

WAYS: tuple[Way, ...] = ("padded", "segments", "varlen")
LENGTHS = [21, 5, 3 * WINDOW, 12, 9, 17, 6, 4 * WINDOW]
LOSS_BF16, COSINE_BF16 = 2e-3, 0.999
LOSS_FP32, GRADIENT_FP32 = 1e-6, 1e-5


def main() -> int:
    """Both tables; 0 where all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--groups", default="8x1,1x8,2x4", help="batch x accumulation, ...")
    parser.add_argument("--only-speed", action="store_true")
    asked = parser.parse_args()
    asked.dtype = asked.dtype or ("bfloat16" if asked.device == "cuda" else "float32")
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, peft {peft.__version__}, {asked.dtype}")
    right = asked.only_speed or families(asked.device, asked.dtype)
    return 0 if speed(asked) and right else 1


def families(device: str, dtype: str) -> bool:
    """Loss and gradients of one step over each family, in each way that can be chosen."""
    print(f"\n{'family':<10} {'way':<9} {'loss off by':>12} {'cosine':>10} {'gradient off by':>16}")
    right = True
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            base, examples = a_family_base(Path(folder, family), family), random_examples(LENGTHS)
            wanted = one_step(a_tiny(base, "padded", device, "float32"), "padded", examples, 1)
            for way in WAYS:
                try:
                    model = a_tiny(base, way, device, dtype)
                    found = one_step(model, way, examples, 8)
                except (Unfit, RuntimeError) as why:
                    print(f"{family:<10} {way:<9} {str(why).splitlines()[0][:80]}")
                    right &= isinstance(why, Unfit)
                    continue
                off, cosine, furthest = compared(found, wanted)
                bounds = (
                    off <= LOSS_FP32 and furthest <= GRADIENT_FP32
                    if dtype == "float32"
                    else off <= LOSS_BF16 and cosine >= COSINE_BF16
                )
                mark = "" if bounds else "  BROKEN"
                right &= bounds or way == "padded"  # the plain way is what bf16 itself costs
                print(f"{family:<10} {way:<9} {off:12.2e} {cosine:10.6f} {furthest:16.2e}{mark}")
    return right


class Unfit(Exception):
    """A way that this model cannot be computed in here."""


def a_tiny(base: Path, way: Way, device: str, dtype: str) -> Any:
    """A family's base with an adapter of random values."""
    weights = load_weights(base, read_config(base), dtype=getattr(torch, dtype), device=device)
    return with_adapter(weights, way, device, dtype)


def with_adapter(weights: Any, way: Way, device: str, dtype: str) -> Any:
    """LoRA on all linear layers in fp32, its second half random, the same whatever the format."""
    precision = Precision("bfloat16" if dtype == "bfloat16" else "float32")
    model = add_adapter(weights, FinetuneArguments(), seed=0, precision=precision)
    stream = torch.Generator().manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            values = 0.05 * torch.randn(parameter.shape, generator=stream)
            with torch.no_grad():
                parameter.copy_(values)
    choice = choose_way(model, device=device, wanted=way)
    if choice.way != way:
        raise Unfit(choice.why)
    attend_by(model, way)
    return model


Result = tuple[float, dict[str, torch.Tensor]]


def one_step(model: Any, way: Way, examples: Sequence[Example], rows: int) -> Result:
    """Loss and gradients of a step; the gradients stay in the model, too."""
    device = str(next(model.parameters()).device)
    units, parts = sum(example.targets for example in examples), []
    plain = [list(examples[i : i + rows]) for i in range(0, len(examples), rows)]
    for group in plain if way == "padded" else filled_groups(examples, rows):
        batch = collate(group, 0, shared=way != "padded").to(device)
        loss = TokenLoss().loss(model, batch).loss / units
        loss.backward()
        parts.append(loss.detach())
    found = {n: p.grad for n, p in trained_parameters(model).items() if p.grad is not None}
    return float(torch.stack(parts).sum()), found


def compared(found: Result, wanted: Result) -> tuple[float, float, float]:
    """The loss, relative; the least cosine of a gradient; the gradient furthest off, relative."""
    cosines, furthest = [], 0.0
    for name, gradient in wanted[1].items():
        one, other = found[1][name].float().flatten(), gradient.float().flatten()
        if float(other.norm()):
            cosines.append(float(torch.nn.functional.cosine_similarity(one, other, dim=0)))
            furthest = max(furthest, float((one - other).norm() / other.norm()))
    return abs(found[0] - wanted[0]) / wanted[0], min(cosines), furthest


@dataclass
class Seen:
    """What was measured of a way. off: how far its loss was from the plain one, at most."""

    rates: list[float] = field(default_factory=list)
    peak: int = 0
    off: float = 0.0


def speed(asked: Any) -> bool:
    """Steps in all ways in turn, for each size of groups; whether losses agree within bounds."""
    config = LlamaConfig(
        hidden_size=asked.hidden,
        intermediate_size=int(3.5 * asked.hidden),
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.kv_heads,
        vocab_size=asked.vocabulary,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(asked.device):
        weights = LlamaForCausalLM(config).to(getattr(torch, asked.dtype))
    model = with_adapter(weights, "padded", asked.device, asked.dtype)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-4)
    ways = [way for way in WAYS if choose_way(model, device=asked.device, wanted=way).way == way]
    limit = LOSS_FP32 if asked.dtype == "float32" else LOSS_BF16
    right = True
    for groups in asked.groups.split(","):
        rows, accumulated = map(int, groups.split("x"))
        seen = {way: Seen() for way in ways}
        take = rows_of(rows * accumulated, asked.vocabulary)
        for step in range(asked.steps + 2):
            paired(model, take(step), rows, seen, warm=step >= 2)
            optimizer.step()
        right &= reported(groups, seen, limit)
    return right


def rows_of(count: int, vocabulary: int) -> Callable[[int], list[Example]]:
    """Rows of a step, the second half of each an answer."""

    def take(step: int) -> list[Example]:
        stream = torch.Generator().manual_seed(step)
        drawn = torch.empty(count).log_normal_(5.1, 0.65, generator=stream)
        lengths = [min(750, max(16, int(length))) for length in drawn]
        return random_examples(lengths, vocabulary=vocabulary)

    return take


def paired(
    model: Any, examples: Sequence[Example], rows: int, seen: dict[Way, Seen], *, warm: bool
) -> None:
    """One step in each way from the same adapter; gradients of the plain way stay in the model."""
    losses = {}
    for way in sorted(seen, key=lambda way: way == "padded"):
        model.get_base_model().set_attn_implementation("sdpa")
        attend_by(model, way)
        model.zero_grad(set_to_none=True)
        seconds, losses[way], peak = timed(model, way, examples, rows)
        if warm:
            seen[way].rates.append(sum(len(example.ids) for example in examples) / seconds)
            seen[way].peak = max(seen[way].peak, peak)
    for way, loss in losses.items():
        seen[way].off = max(seen[way].off, abs(loss - losses["padded"]) / losses["padded"])


def timed(model: Any, way: Way, examples: Sequence[Example], rows: int) -> tuple[float, float, int]:
    """Seconds of a step, its loss, and the most memory that it held on the GPU."""
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter() if on_gpu else time.process_time()
    loss, _ = one_step(model, way, examples, rows)
    if not on_gpu:  # processor time: other programs on the machine count for nothing
        return time.process_time() - began, loss, 0
    torch.cuda.synchronize()
    return time.perf_counter() - began, loss, torch.cuda.max_memory_allocated()


def reported(groups: str, seen: dict[Way, Seen], limit: float) -> bool:
    """A line for each way; whether losses are within the limit."""
    plain, right = seen["padded"], True
    print(f"\nbatch x accumulation {groups}, {len(plain.rates)} steps")
    for way, found in seen.items():
        ratios = [a / b for a, b in zip(found.rates, plain.rates, strict=True)]
        right &= found.off <= limit
        print(
            f"  {way:<9} {statistics.median(found.rates):9.0f} tokens/s"
            f"  x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"  peak {found.peak / 2**30:6.2f} GiB  loss off by {found.off:.1e} at most"
            f"{'' if found.off <= limit else '  BROKEN'}"
        )
    return right


if __name__ == "__main__":
    sys.exit(main())
