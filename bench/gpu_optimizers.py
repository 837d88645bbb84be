"""Optimizers and number formats on a GPU: what learns, is skipped, and resumes in the same bits.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python -P bench/gpu_optimizers.py [--device cpu] [NAME …]

Each case trains a random Llama for eight steps and once more from the checkpoint of step four. It
prints the loss of the first and of the last step, how many steps fp16's scaler skipped, and whether
both runs left the same bits. Exit code 1 when one did not learn or resume. Needs torch,
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
CASES: Mapping[str, dict[str, Any]] = {
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

OVERFLOWING = 2.0**20


def main() -> int:
    """Run all cases, or those that are named; 0 if all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--hidden", type=int, default=512)
    asked = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
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
    """A base and rows."""
    base, rows = folder / "base", folder / "rows.jsonl"
    write_tiny_llama(base, hidden=hidden, layers=4)
    lines = [
        {"instruction": f"Count to {i}.", "output": "one two " * (1 + i % 5)} for i in range(32)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"model": str(base), "dataset": str(rows)}


def measure(
    folder: Path, name: str, inputs: Mapping[str, str], told: dict[str, Any], device: str
) -> bool:
    """One case; whether it learned and resumed in the same bits."""
    arguments = {"max_steps": 8, "save_steps": 4, "learning_rate": 5e-3} | told
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
    held = same and losses[-1] < losses[0]
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
