"""Tuning in bf16 on a GPU, within its bounds of fp32 and of the plain recipe.

    python -P bench/gpu_methods.py ROWS.json PAIRS.json [--hidden 2048 --layers 16 --heads 16]

Makes a Llama that has learned the first half of the rows by heart, in bf16, and by a fine-tune in
fp32 one adapter of the other half that lora, qlora and dpo go on from. For each method it prints:

- the loss of each step of a run in bf16 against the plain recipe's in bf16 (the same rows padded
  to one length, or with --alone one row at a time; whole logits, the same weights): the greatest
  relative distance; every tenth step, how far both are from fp32;
- the gradients of eight rows in bf16 against fp32, the least cosine of a tensor, and that of the
  plain recipe in bf16;
- steps a second, and the most GPU memory that was reserved;

and of the merged adapter: the greatest difference of logits in fp32, the mean KL divergence in bf16
and how many of 64 prompts are answered alike, as well as by the merged model itself with and
without its cache. Exit code 1 when a bound does not hold. Needs torch, transformers, peft and
bitsandbytes; no network.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from tuneyard.runners.adapter import trained_parameters
from tuneyard.runners.asked import read_asked
from tuneyard.runners.assembly import build_trainer
from tuneyard.runners.attempt import Attempt, run_attempt
from tuneyard.runners.batches import collate
from tuneyard.runners.examples import Example, Item, Pair
from tuneyard.runners.finetune import finetune
from tuneyard.runners.fixtures import write_tiny_llama
from tuneyard.runners.merge import merge
from tuneyard.runners.tokenising import load_chat, read_rows_of, tokenise
from tuneyard.runners.training import Trainer

LOSS_BOUND = 2e-3
COSINE_BOUND = 0.999
LOGITS_BOUND, KL_BOUND, SAME_BOUND = 1e-4, 1e-3, 0.95

METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization_bit": 4},
    "full": {"finetuning_type": "full", "learning_rate": 1e-5},
    "dpo": {"stage": "dpo", "learning_rate": 5e-6},
    "dpo, beta 0.01, 64 pairs": {
        "stage": "dpo",
        "learning_rate": 5e-6,
        "pref_beta": 0.01,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 8,
    },
}


# What learns, by name, as it was before the first step.
Began = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step: the engine's, the plain recipe's and, of some steps, that in fp32."""

    ours: float
    plain: float
    exact: float | None


@dataclass(frozen=True)
class Bench:
    """Where things lie, how long runs are, and whether the plain recipe reads a row at a time."""

    folder: Path
    device: str
    steps: int
    alone: bool

    def run(
        self, work: Callable[[Attempt], None], inputs: Mapping[str, Path], **arguments: Any
    ) -> Path:
        """Run an attempt in this process; its work folder."""
        workdir = Path(tempfile.mkdtemp(dir=self.folder))
        paths = {name: str(path) for name, path in inputs.items()}
        spec = {"kind": "finetune", "device": self.device, "inputs": paths, "arguments": arguments}
        (workdir / "spec.json").write_text(json.dumps(spec))
        code = run_attempt(work, [str(workdir / "spec.json"), str(workdir)])
        if code:
            raise SystemExit(f"{arguments}: exit code {code}")
        if self.device == "gpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return workdir


def main() -> int:
    """Measure every method; 0 if all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base-steps", type=int, default=600, help="of the base itself")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--alone", action="store_true", help="the plain recipe reads rows alone")
    asked = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked.device, asked.steps, asked.alone)
        learned, rows = halves(asked.rows, Path(folder))
        base = Path(folder, "base")
        write_tiny_llama(base, hidden=asked.hidden, layers=asked.layers, heads=asked.heads)
        learn_by_heart(bench, base, learned, asked.base_steps)
        print(
            f"{torch.cuda.get_device_name() if asked.device == 'gpu' else 'CPU'}, torch "
            f"{torch.__version__}, base of {_parameters(base) / 1e6:.0f} M parameters"
        )
        start = (
            bench.run(
                finetune,
                {"model": base, "dataset": rows},
                precision="fp32",
                max_steps=30,
                lora_rank=16,
                learning_rate=2e-4,
                cutoff_len=512,
            )
            / "output"
        )
        held = [
            measure(bench, name, base, start, asked.pairs if "dpo" in name else rows)
            for name in asked.methods
        ]
        held.append(measure_merge(bench, base, start, learned))
    return 0 if all(held) else 1


def halves(rows: Path, folder: Path) -> tuple[Path, Path]:
    """The first and the second half of the rows, as files in a folder."""
    found = json.loads(rows.read_text())
    paths = folder / "learned.json", folder / "rows.json"
    for path, half in zip(paths, (found[::2], found[1::2]), strict=True):
        path.write_text(json.dumps(half))
    return paths


def learn_by_heart(bench: Bench, base: Path, rows: Path, steps: int) -> None:
    """Let a random base learn rows, so that it is as sure of its words as bases are."""
    tuned = bench.run(
        finetune, {"model": base, "dataset": rows}, finetuning_type="full", precision="bf16",
        max_steps=steps, learning_rate=3e-4, cutoff_len=512, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, save_strategy="no", warmup_ratio=0.1,
    )  # fmt: skip
    loss = metric(tuned, "loss")
    print(f"base: loss {loss[0]:.4f} -> {loss[-1]:.4f}")
    load(tuned / "output", torch.bfloat16, "cpu").save_pretrained(base)


def measure(bench: Bench, name: str, base: Path, start: Path, data: Path) -> bool:
    """One method in bf16 against fp32; whether its bounds hold."""
    inputs = {"model": base, "dataset": data}
    if name != "full":
        inputs["adapter"] = start
    arguments = {
        "max_steps": bench.steps, "lora_rank": 16, "learning_rate": 1e-4, "cutoff_len": 512,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no",
    } | METHODS[name]  # fmt: skip
    gradients, plain = {}, {}
    for precision in ("fp32", "bf16"):
        found: list[dict[str, torch.Tensor]] = []
        bench.run(look_at(found, bench.alone), inputs, precision=precision, **arguments)
        gradients[precision], plain[precision] = found
    losses: list[StepLoss] = []
    run = bench.run(walk(losses, bench.alone), inputs, precision="bf16", **arguments)
    pace = metric(run, "tokens_per_s")
    memory = metric(run, "gpu_bytes" if bench.device == "gpu" else "rss_bytes")
    distance = max(abs(step.ours - step.plain) / step.plain for step in losses)
    compared = [(step, step.exact) for step in losses if step.exact is not None]
    rounding = max(abs(step.ours - exact) / exact for step, exact in compared)
    plain_rounding = max(abs(step.plain - exact) / exact for step, exact in compared)
    ours = least_cosine(gradients["bf16"], gradients["fp32"])
    theirs = least_cosine(plain["bf16"], plain["fp32"])
    held = distance <= LOSS_BOUND and (ours >= COSINE_BOUND or ours >= theirs)
    print(
        f"{name}: loss {losses[0].ours:.4f} -> {losses[-1].ours:.4f}, at most {distance:.1e} from "
        f"the plain recipe over {bench.steps} steps, {rounding:.1e} from fp32, the plain recipe "
        f"{plain_rounding:.1e}; least cosine of a gradient {ours:.6f}, of the plain recipe "
        f"{theirs:.6f}; "
        f"{sorted(pace)[len(pace) // 2]:,.0f} tokens/s, {max(memory) / 1e9:.1f} GB: "
        f"{'held' if held else 'NOT HELD'}"
    )
    return held


def trainer_of(attempt: Attempt, **changed: Any) -> Trainer:
    """A run that is ready to take its first step."""
    asked = read_asked(attempt)
    asked = replace(asked, arguments=asked.arguments.model_copy(update=changed))
    rows = read_rows_of(attempt, asked.arguments)
    chat = load_chat(asked.model, asked.arguments, attempt)
    trainer = build_trainer(asked, attempt, chat, tokenise(rows, asked.arguments, chat, attempt))
    trainer.running.model.train()
    return trainer


def walk(losses: list[StepLoss], alone: bool) -> Callable[[Attempt], None]:
    """Work that takes all steps: each loss, the plain recipe's, and now and then that in fp32."""

    def work(attempt: Attempt) -> None:
        trainer, exact = trainer_of(attempt), trainer_of(attempt, precision="fp32")
        began, exact_began = copied(trainer), copied(exact)
        learning = trained_parameters(exact.running.model)
        for number in range(trainer.plan.steps):
            in_fp32 = None
            if number % 10 == 0:
                with torch.no_grad():
                    for name, parameter in trained_parameters(trainer.running.model).items():
                        learning[name].copy_(parameter)
                in_fp32 = loss_ahead(exact, trainer.at.examples, exact_began, alone)
            plain = loss_ahead(trainer, trainer.at.examples, began, alone)
            step = trainer._step()
            trainer._finish(step)
            losses.append(StepLoss(step.loss, plain, in_fp32))

    return work


@torch.no_grad()
def loss_ahead(trainer: Trainer, consumed: int, began: Began, alone: bool) -> float:
    """The loss of the rows that come next, by the plain recipe."""
    rows = trainer.data.order.take(consumed, trainer.plan.rows_per_step)
    items = [trainer.data.examples[i] for i in rows]
    groups = groups_of(items, 1 if alone else trainer.plan.rows_per_batch)
    total = sum(float(plain_loss(trainer, group, began)) for group in groups)
    return total / sum(map(trainer.objective.units, items))


def look_at(found: list[dict[str, torch.Tensor]], alone: bool) -> Callable[[Attempt], None]:
    """Work that takes the gradients of eight rows, by the engine and by the plain recipe."""

    def work(attempt: Attempt) -> None:
        trainer = trainer_of(attempt)
        items = list(trainer.data.examples[:8])
        units = sum(map(trainer.objective.units, items))
        began = copied(trainer)
        for group in groups_of(items, 4):
            trainer._backward(collate(group, trainer.data.pad_id), units)
        found.append(taken_gradients(trainer))
        for group in groups_of(items, 1 if alone else 4):
            (plain_loss(trainer, group, began) / units).backward()
        found.append(taken_gradients(trainer))

    return work


def groups_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in groups of a size."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def taken_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients that there are, and none left."""
    model = trainer.running.model
    found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_loss(trainer: Trainer, items: Sequence[Item], began: Began) -> torch.Tensor:
    """The summed loss of items as a textbook has it."""
    pairs = [item for item in items if isinstance(item, Pair)]
    rows = [item for item in items if isinstance(item, Example)]
    rows += [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with trainer.running.casting():
        if not pairs:
            return -logps(trainer, rows).sum()
        with torch.no_grad(), put_in(began, trainer):
            before = logps(trainer, rows)
        chosen, rejected = (logps(trainer, rows) - before).chunk(2)
    return -logsigmoid(trainer.objective.beta * (chosen - rejected)).sum()


def logps(trainer: Trainer, rows: Sequence[Example]) -> torch.Tensor:
    """log p of the targets of each row; rows are padded on the right."""
    padded = pad_sequence([torch.tensor(row.ids) for row in rows], True, trainer.data.pad_id)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], True, -100)
    mask = pad_sequence([torch.ones(len(row.ids), dtype=torch.long) for row in rows], True)
    device = trainer.running.device
    asked = {"input_ids": padded.to(device)}
    if len(rows) > 1:
        asked["attention_mask"] = mask.to(device)
    logits = trainer.running.model(**asked).logits[:, :-1].float()
    losses = cross_entropy(logits.mT, labels[:, 1:].to(device), reduction="none")
    return -losses.sum(1)


def copied(trainer: Trainer) -> Began:
    """What learns, as it is now."""
    learning = trained_parameters(trainer.running.model)
    return {name: parameter.detach().clone() for name, parameter in learning.items()}


@contextmanager
def put_in(began: Began, trainer: Trainer) -> Iterator[None]:
    """Put what learns back to how it was, for a while."""
    learning, now = trained_parameters(trainer.running.model), copied(trainer)
    try:
        for name, parameter in learning.items():
            parameter.data.copy_(began[name])
        yield
    finally:
        for name, parameter in learning.items():
            parameter.data.copy_(now[name])


def least_cosine(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The cosine of the tensor in which two sets of gradients agree least."""
    cosines = {}
    for name, x in a.items():
        y = b[name]
        if y.norm() > 0:
            cosines[name] = float((x * y).sum() / (x.norm() * y.norm()))
    return min(cosines.values())


def metric(workdir: Path, name: str) -> list[float]:
    """A metric of each step."""
    events = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
    return [e["values"][name] for e in events if e["type"] == "metric" and name in e["values"]]


def measure_merge(bench: Bench, base: Path, adapter: Path, rows: Path) -> bool:
    """The merged folder against base and adapter; whether the bounds hold."""
    device = "cuda" if bench.device == "gpu" else "cpu"
    prompts = [row["instruction"][:200] for row in json.loads(rows.read_text())[:64]]
    found = {}
    for precision in ("float32", "bfloat16"):
        inputs = {"model": base, "adapter": adapter}
        folder = bench.run(merge, inputs, dtype=precision) / "output"
        dtype = getattr(torch, precision)
        tuned = PeftModel.from_pretrained(load(base, dtype, device), str(adapter))
        tokens = 32 if precision == "bfloat16" else 0
        found[precision] = compare(tuned, load(folder, dtype, device), base, prompts, tokens)
    logits, half = found["float32"].logits, found["bfloat16"]
    held = logits <= LOGITS_BOUND and half.divergence <= KL_BOUND
    held = held and half.same >= SAME_BOUND * len(prompts)
    print(
        f"merge: logits at most {logits:.1e} apart in fp32; in bf16 mean KL {half.divergence:.1e}, "
        f"{half.same} of {len(prompts)} prompts answered alike, {half.same_uncached} by the merged "
        f"model itself without its cache: {'held' if held else 'NOT HELD'}"
    )
    return held


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """A model by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


@dataclass
class Likeness:
    """How alike two models are: the greatest difference of logits, the mean KL divergence, equal
    answers, and equal answers of the second with and without its cache."""

    logits: float = 0.0
    divergence: float = 0.0
    same: int = 0
    same_uncached: int = 0


@torch.no_grad()
def compare(a: Any, b: Any, base: Path, prompts: list[str], tokens: int) -> Likeness:
    """How alike two models read prompts and, if tokens is not 0, answer them."""
    from tuneyard.runners.base_model import load_tokenizer

    tokenizer, found = load_tokenizer(base), Likeness()
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(b.device)
        x, y = (model(input_ids=ids).logits[0].float() for model in (a, b))
        found.logits = max(found.logits, float((x - y).abs().max()))
        apart = kl_div(log_softmax(y, -1), log_softmax(x, -1), log_target=True, reduction="none")
        found.divergence += float(apart.sum(-1).mean()) / len(prompts)
        if tokens:
            asked = {"input_ids": ids, "max_new_tokens": tokens, "do_sample": False}
            answer = b.generate(**asked)
            found.same += torch.equal(a.generate(**asked), answer)
            found.same_uncached += torch.equal(b.generate(**asked, use_cache=False), answer)
    return found


def _parameters(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2


if __name__ == "__main__":
    sys.exit(main())
