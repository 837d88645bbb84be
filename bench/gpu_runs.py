"""Stages, tunings, optimizers, number formats on a GPU: what learns and resumes in the same bits.

    python -P bench/gpu_runs.py [--device cpu] [NAME …]

Each case trains a random Llama for eight steps and once more from the checkpoint of step four. It
prints the loss of the first and of the last step, how many steps fp16's scaler skipped, and whether
both runs left the same bits. Exit code 1 when one did not resume, or did not learn; grpo and rloo
draw other answers at each step, whose losses say nothing of that. Needs torch,
transformers, peft and the optimizers' packages; one that is not there is named, and its case left
out; no network.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuneyard.runners import assembly
from tuneyard.runners.attempt import run_attempt
from tuneyard.runners.finetune import finetune
from tuneyard.runners.fixtures import write_tiny_llama
from tuneyard.runners.precision import Precision
from tuneyard.store.folder import read_manifest

FULL = {"finetuning_type": "full", "learning_rate": 1e-3}
GALORE = {"use_galore": True, "galore_rank": 16, "galore_update_interval": 2}
ONLINE = {
    "reward_funcs": [{"name": "contains", "text": "one"}, {"name": "length", "target": 8}],
    "num_generations": 4, "max_completion_length": 16, "per_device_train_batch_size": 8,
}  # fmt: skip
STAGES: Mapping[str, dict[str, Any]] = {
    "pt": {"stage": "pt"},
    "rm": {"stage": "rm"},
    **{f"dpo, {loss}": {"stage": "dpo", "pref_loss": loss, "learning_rate": 1e-3}
       for loss in ("sigmoid", "hinge", "ipo", "orpo", "simpo")},
    "dpo, full": {"stage": "dpo", "finetuning_type": "full", "learning_rate": 1e-4},
    "dpo, 4 bit": {"stage": "dpo", "quantization_bit": 4, "learning_rate": 1e-3},
    "kto": {"stage": "kto", "learning_rate": 1e-3},
    "grpo": {"stage": "grpo", **ONLINE, "beta": 0.04},
    "rloo": {"stage": "rloo", **ONLINE},
}  # fmt: skip
TUNINGS: Mapping[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora+": {"loraplus_lr_ratio": 4.0},
    "pissa": {"pissa_init": True, "pissa_iter": 4},
    "additional": {"additional_target": "lm_head,norm"},
    "oft": {"finetuning_type": "oft", "oft_block_size": 8},
    "adalora": {"finetuning_type": "adalora"},
    "vera": {"finetuning_type": "vera", "learning_rate": 0.1},
    "ia3": {"finetuning_type": "ia3", "learning_rate": 0.1},
    "prefix": {"finetuning_type": "prefix", "num_virtual_tokens": 4, "learning_rate": 0.05},
    "p_tuning": {"finetuning_type": "p_tuning", "num_virtual_tokens": 4},
    "prompt_tuning": {
        "finetuning_type": "prompt_tuning", "num_virtual_tokens": 4, "learning_rate": 0.1,
    },
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "4 bit, nf4": {"quantization_bit": 4},
    "4 bit, fp4": {"quantization_bit": 4, "quantization_type": "fp4"},
    "8 bit": {"quantization_bit": 8},
    "4 bit, dora": {"quantization_bit": 4, "use_dora": True},
    "4 bit, oft": {"quantization_bit": 4, "finetuning_type": "oft", "oft_block_size": 8},
    "packing": {"packing": True, "cutoff_len": 512},
    "neftune": {"neftune_noise_alpha": 5.0},
    "evaluated": {"val_size": 0.25, "eval_steps": 2, "eval_strategy": "steps"},
}  # fmt: skip
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"bf16": True},
    "pure_bf16": {"pure_bf16": True},
    "fp16": {"fp16": True},
    "fp16, an overflow": {"fp16": True, "overflow": True},
    "fp16, an overflow, muon": {**FULL, "fp16": True, "overflow": True, "use_muon": True},
    "adamw_8bit": {**FULL, "optim": "adamw_8bit"},
    "paged_adamw_32bit": {**FULL, "optim": "paged_adamw_32bit"},
    "paged_adamw_8bit": {**FULL, "optim": "paged_adamw_8bit"},
    "paged_lion_8bit": {**FULL, "optim": "paged_lion_8bit", "learning_rate": 1e-4},
    "paged_ademamix_8bit": {**FULL, "optim": "paged_ademamix_8bit"},
    "adafactor": {**FULL, "optim": "adafactor"},
    "muon, pure_bf16": {**FULL, "use_muon": True, "pure_bf16": True},
    "schedule_free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "stable_adamw": {**FULL, "optim": "stable_adamw", "pure_bf16": True},
    "grokadamw": {**FULL, "optim": "grokadamw"},
    "galore": {**FULL, **GALORE},
    "galore, 8 bit": {**FULL, **GALORE, "optim": "adamw_8bit"},
    "galore by name, 8 bit, layers": {
        **FULL,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": "all-linear",
        "optim_args": "rank=16,update_proj_gap=2,scale=2",
    },
    "apollo": {**FULL, "use_apollo": True, "apollo_rank": 16},
    "badam": {**FULL, "use_badam": True, "badam_switch_interval": 3, "pure_bf16": True},
    "adam_mini": {**FULL, "use_adam_mini": True},
}
CASES = STAGES | TUNINGS | OPTIMIZERS

OVERFLOWING = 2.0**20


def main() -> int:
    """Run all cases, or those that are named; 0 if all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--hidden", type=int, default=512)
    asked = parser.parse_args()
    plain = assembly.scaler_of
    held = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder), asked.hidden)
        for name in asked.names:
            told = dict(CASES[name])
            assembly.scaler_of = overflowing if told.pop("overflow", False) else plain
            held.append(measure(Path(folder), name, inputs, told, asked.device))
    return 0 if all(held) else 1


def overflowing(precision: Precision) -> torch.amp.GradScaler:
    """A scaler whose first steps overflow."""
    return torch.amp.GradScaler("cuda", init_scale=OVERFLOWING, enabled=precision.autocast)


def make_inputs(folder: Path, hidden: int) -> dict[str, str]:
    """A base and rows: in dataset-STAGE those that a stage needs, in dataset all others'."""
    base = folder / "base"
    write_tiny_llama(base, hidden=hidden, layers=4)
    rows = [
        {"instruction": f"Count to {i}.", "output": "one two " * (1 + i % 5)} for i in range(32)
    ]
    liked = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": "three, I think"}
        for row in rows
    ]
    labelled = [
        row | ({"kto_tag": True} if i % 2 else {"output": "three, I think", "kto_tag": False})
        for i, row in enumerate(rows)
    ]
    texts = [{"text": row["instruction"] + row["output"]} for row in rows]
    inputs = {"model": str(base)}
    kinds = {"": rows, "-pt": texts, "-rm": liked, "-dpo": liked, "-kto": labelled}
    for kind, found in kinds.items():
        path = folder / f"rows{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        inputs[f"dataset{kind}"] = str(path)
    return inputs


def measure(
    folder: Path, name: str, inputs: Mapping[str, str], told: dict[str, Any], device: str
) -> bool:
    """One case; whether it learned and resumed in the same bits."""
    arguments = {
        "max_steps": 8, "save_steps": 4, "learning_rate": 5e-3, "full_determinism": True,
    } | told  # fmt: skip
    stage = arguments.get("stage", "sft")
    dataset = inputs.get(f"dataset-{stage}", inputs["dataset"])
    inputs = {"model": inputs["model"], "dataset": dataset}
    whole = run(folder, inputs, arguments, device)
    if isinstance(whole, str):
        print(f"{name}: {whole}")
        return "lacks" in whole
    again = run(folder, inputs, arguments, device, resume=whole / "checkpoints" / "step-4")
    if isinstance(again, str):
        print(f"{name}: resumed: {again}")
        return False
    losses = [e["values"]["loss"] for e in events(whole) if "loss" in e.get("values", {})][:8]
    (result,) = (e["values"] for e in events(whole) if e["type"] == "result")
    same = weights(whole) == weights(again)
    held = same and (losses[-1] < losses[0] or stage in ("grpo", "rloo"))
    print(
        f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {result['skipped_steps']} skipped, "
        f"resumed in {'the same' if same else 'OTHER'} bits: {'held' if held else 'NOT HELD'}"
    )
    return held


def run(
    folder: Path,
    inputs: Mapping[str, str],
    arguments: Mapping[str, Any],
    device: str,
    *,
    resume: Path | None = None,
) -> Path | str:
    """Run an attempt in this process: its work folder, or why it failed."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    spec = {"kind": "finetune", "device": device, "inputs": inputs, "arguments": arguments}
    spec |= {"resume": str(resume)} if resume else {}
    (workdir / "spec.json").write_text(json.dumps(spec))
    if run_attempt(finetune, [str(workdir / "spec.json"), str(workdir)]):
        (said,) = (e["evidence"] for e in events(workdir) if e["type"] == "failed")
        return str(said)
    return workdir


def events(workdir: Path) -> list[dict[str, Any]]:
    """What the runner told."""
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def weights(workdir: Path) -> dict[str, str]:
    """Digests of the weights that a run left."""
    files = read_manifest(workdir / "output")["files"]
    return {each["path"]: each["sha256"] for each in files if ".safetensors" in each["path"]}


if __name__ == "__main__":
    raise SystemExit(main())
