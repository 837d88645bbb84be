"""A merge needs no memory for the model: one that is larger than the limit is merged within it.

By itself (`make test-merge-memory`), since it writes some 2 GB.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from support.attempts_by_hand import Ran, write_spec
from support.tiny_models import a_tiny_base

from tuneyard.runners.tensor_files import weights_of

LIMIT = 384 * 1024**2
"""Bytes of memory of its own that the runner may ask for; torch alone takes half of them."""

LAYERS, HIDDEN, INNER, VOCABULARY, RANK = 24, 1024, 4096, 64_000, 16


def a_large_base(folder: Path) -> Path:
    """A Llama of 1.1 GB in bf16, whose embedding alone is a third of the limit; random numbers."""
    a_tiny_base(folder)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    shapes["model.norm"] = (HIDDEN,)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (HIDDEN, INNER)
        shapes |= {f"{at}.{n}_layernorm": (HIDDEN,) for n in ("input", "post_attention")}
    noise = torch.randn(VOCABULARY * HIDDEN).bfloat16()
    tensors = {f"{n}.weight": noise[: torch.Size(s).numel()].view(s) for n, s in shapes.items()}
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def an_adapter_over(base: Path, folder: Path) -> Path:
    """An adapter over every linear layer, as peft writes it."""
    folder.mkdir()
    tensors = {}
    for name, tensor in weights_of(base).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = LoraConfig(r=RANK, lora_alpha=32).to_dict() | {"target_modules": []}
    config = {k: getattr(v, "value", v) for k, v in config.items() if not isinstance(v, set)}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    return folder


def test_a_model_larger_than_the_memory_limit_is_merged_within_it(tmp_path: Path) -> None:
    base = a_large_base(tmp_path / "base")
    adapter = an_adapter_over(base, tmp_path / "adapter")
    size = (base / "model.safetensors").stat().st_size
    assert size > 2.5 * LIMIT
    spec, workdir = write_spec(
        tmp_path, kind="merge", inputs={"model": base, "adapter": adapter},
        arguments={"export_size": 0.5},
    )  # fmt: skip
    argv = [sys.executable, "-P", "-m", "tuneyard.runners.merge", str(spec), str(workdir)]
    runner = subprocess.Popen(
        argv,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    _, status, usage = os.wait4(runner.pid, 0)
    runner.returncode = os.waitstatus_to_exitcode(status)
    ran = Ran(runner.returncode, workdir)
    assert ran.code == 0, ran.events[-1]
    assert ran.of_type("result")[0]["values"]["pairs"] == 7 * LAYERS
    peak = usage.ru_maxrss * 1024
    sys.stdout.write(f"\n{size / 1e9:.2f} GB merged; peak resident {peak / 2**20:.0f} MiB\n")
    assert peak < 1.5 * LIMIT  # file pages of the libraries count here, and not in the limit
