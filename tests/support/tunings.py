"""Every way to tune, as arguments of a run on a tiny base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import chat_of
from tuneyard.runners.examples import IGNORED, Cutting, Example, encode
from tuneyard.runners.finetune import finetune
from tuneyard.runners.losses import TokenLoss
from tuneyard.runners.rows import read_conversations

FAST = 0.01  # learning rate at which a tiny model learns within a few steps

TUNINGS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora+": {"loraplus_lr_ratio": 4.0},
    "pissa": {"pissa_init": True, "pissa_iter": 4, "lora_rank": 4},
    "pissa-exact": {"pissa_init": True, "pissa_iter": -1, "lora_rank": 4},
    "additional": {"additional_target": "lm_head,norm"},
    "layers": {"layers_to_transform": [1], "lora_target": "q_proj,down_proj"},
    "llama-pro": {"use_llama_pro": True, "freeze_trainable_layers": 1},
    "oft": {"finetuning_type": "oft", "oft_block_size": 8},
    "adalora": {"finetuning_type": "adalora", "lora_rank": 4},
    "vera": {"finetuning_type": "vera", "vera_rank": 16, "learning_rate": 0.1},
    "ia3": {"finetuning_type": "ia3", "learning_rate": 0.1},
    "prefix": {"finetuning_type": "prefix", "num_virtual_tokens": 4, "learning_rate": 0.05},
    "p_tuning": {"finetuning_type": "p_tuning", "num_virtual_tokens": 4},
    "prompt_tuning": {
        "finetuning_type": "prompt_tuning", "num_virtual_tokens": 4, "learning_rate": 0.1,
    },
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze-parts": {
        "finetuning_type": "freeze", "freeze_trainable_layers": -1,
        "freeze_trainable_modules": "mlp", "freeze_extra_modules": "lm_head,norm",
    },
    "freeze-pro": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 1, "use_llama_pro": True,
    },
    "qlora-nf4": {"quantization_bit": 4},
    "qlora-fp4": {
        "quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False,
    },
    "qlora-int8": {"quantization_bit": 8},
    "qdora": {"quantization_bit": 4, "use_dora": True},
    "qoft": {"quantization_bit": 4, "finetuning_type": "oft", "oft_block_size": 8},
}  # fmt: skip
"""Name -> arguments."""

PROMPTED = ("prefix", "p_tuning", "prompt_tuning")
WHOLE = tuple(name for name in TUNINGS if name.startswith(("full", "freeze")))
QUANTISED = tuple(name for name in TUNINGS if name.startswith("q"))
MERGEABLE = tuple(name for name in TUNINGS if name not in PROMPTED + WHOLE)

SHORT = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": FAST}


def tune_by(
    folder: Path,
    base: Path,
    name: str,
    *,
    resume: Path | None = None,
    adapters: tuple[Path, ...] = (),
    **more: Any,
) -> Ran:
    """Fine-tune a base on eight rows in one of the ways."""
    rows = folder / "rows.jsonl"
    inputs = {"model": base, "dataset": rows if rows.exists() else a_dataset(rows)}
    names = ["adapter", *(f"adapter_{i}" for i in range(2, 9))]
    inputs |= dict(zip(names, adapters, strict=False))
    return run_here(
        folder,
        finetune,
        inputs=inputs,
        input_ids={"model": "tiny"},
        resume=resume and str(resume),
        arguments=SHORT | dict(TUNINGS[name]) | more,
    )


def examples_of(base: Path, dataset: Path) -> list[Example]:
    """Rows as tokens and labels."""
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    return encode(read_conversations(dataset), chat, Cutting()).examples


@torch.no_grad()
def loss_of_a_batch(model: Any, examples: list[Example]) -> float:
    """The same for rows side by side: int8 looks at all of them for what it must not round."""
    batch = collate(examples, 2)
    return float(TokenLoss().loss(model, batch).loss) / sum(e.targets for e in examples)


@torch.no_grad()
def mean_loss(model: Any, examples: list[Example]) -> float:
    """The recipe as a textbook has it: a row at a time, full logits, one mean over all targets."""
    losses = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, -len(example.ids) : -1]
        labels = torch.tensor(example.labels[1:])
        kept = labels != IGNORED
        losses.append(
            torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="none")
        )
    return float(torch.cat(losses).mean())


def plain_base(base: Path, **loading: Any) -> Any:
    """The base as plain transformers opens it; 4 bits are multiplied as they are in training."""
    model = AutoModelForCausalLM.from_pretrained(base, **loading).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def plain_result(ran: Ran, base: Path, **loading: Any) -> Any:
    """A run's result as plain transformers and peft open it: a model, or an adapter over a base."""
    output = ran.workdir / "output"
    if not (output / "adapter_config.json").exists():
        return plain_base(output)
    return PeftModel.from_pretrained(plain_base(base, **loading), str(output)).eval()
