"""grpo and rloo against TRL, from the same adapter, with the same answers and rewards.

`make test-trl` installs TRL beside this environment and names its interpreter in TRL_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.attempts_by_hand import run_here
from support.online import SHORT
from support.tiny_models import a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners.adapter import add_adapter
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.chat import chat_of
from tuneyard.runners.examples import IGNORED
from tuneyard.runners.finetune import finetune
from tuneyard.runners.judges import Functions
from tuneyard.runners.learned import save_adapter
from tuneyard.runners.precision import Precision
from tuneyard.runners.rollouts import Rollouts

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

STEPS = 4
ROWS = [{"prompt": f"What is {i} + {i % 7}?"} for i in range(8 * STEPS)]
"""Eight questions a step, four answers to each, in two groups of sixteen."""


@pytest.fixture(scope="module")
def trl_python() -> str:
    if "TRL_PYTHON" not in os.environ:
        pytest.skip("TRL_PYTHON names no interpreter: `make test-trl`")
    return str(Path(os.environ["TRL_PYTHON"]).absolute())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What our run draws, step by step, and what it is worth."""
    found: list[dict[str, Any]] = []
    call, judge = Rollouts.__call__, Functions.scores

    def record(self: Rollouts, *arguments: Any, **more: Any) -> Any:
        items, measures = call(self, *arguments, **more)
        labels = [item.example.labels for item in items]
        asked = [labels_.count(IGNORED) for labels_ in labels]
        ids = [item.example.ids for item in items]
        found[-1]["asked"] = [row[:n] for row, n in zip(ids, asked, strict=True)]
        found[-1]["answers"] = [row[n:] for row, n in zip(ids, asked, strict=True)]
        return items, measures

    def judged(self: Functions, *arguments: Any) -> Any:
        scores = judge(self, *arguments)
        found.append({"rewards": [sum(row) for row in scores]})
        return scores

    monkeypatch.setattr(Rollouts, "__call__", record)
    monkeypatch.setattr(Functions, "scores", judged)
    return found


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "grpo", "beta": 0.2, "temperature": 0.7}),
        ("grpo", {"loss_type": "dr_grpo", "beta": 0.2, "scale_rewards": "batch"}),
        ("grpo", {"scale_rewards": "none", "temperature": 1.3}),
        ("rloo", {"beta": 0.0}),
        ("rloo", {"beta": 0.2, "temperature": 0.7}),
        ("rloo", {"beta": 0.2, "normalize_advantages": True}),
    ],
    ids=str,
)
def test_the_same_answers_teach_the_same(
    trl_python: str,
    base: Path,
    tape: list[dict[str, Any]],
    tmp_path: Path,
    stage: str,
    options: dict[str, Any],
) -> None:
    shared = {
        "num_generations": 4,
        "max_completion_length": 6,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
    } | options
    ours = run_here(
        tmp_path,
        finetune,
        inputs={"model": base, "dataset": a_dataset(tmp_path / "rows.jsonl", ROWS)},
        seed=42,
        arguments=SHORT | {"stage": stage, "disable_shuffling": True} | shared,
    )
    assert ours.code == 0, ours.failure
    weights = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    begun = add_adapter(weights, FinetuneArguments(), seed=42, precision=Precision("float32"))
    (tmp_path / "begun").mkdir()
    save_adapter(begun, tmp_path / "begun", base_id="tiny")
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    texts = [
        chat.render([{"role": "user", "content": row["prompt"]}], generation_prompt=True)
        for row in ROWS
    ]
    task = {
        "base": str(base),
        "adapter": str(tmp_path / "begun"),
        "stage": stage,
        "prompts": texts,
        "steps": tape,
        "options": shared
        | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
        | {"save_strategy": "no", "report_to": "none", "shuffle_dataset": False, "seed": 1},
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    result = tmp_path / "learned.safetensors"
    script = Path(__file__).with_name("trl_side.py")
    argv = [trl_python, "-P", str(script), str(tmp_path / "task.json"), str(result)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-3000:]

    theirs = load_file(result)
    for name, tensor in load_file(ours.workdir / "output" / "adapter_model.safetensors").items():
        moved = tensor - load_file(tmp_path / "begun" / "adapter_model.safetensors")[name]
        error = (tensor - theirs[name]).norm() / moved.norm()
        assert error < 1e-3, (name, float(error))
    with safe_open(result, framework="pt") as file:
        history = json.loads(file.metadata()["history"])
    for name in ("loss", "grad_norm", "reward"):
        found = [line[name] for line in history]
        expected = list(ours.metric(name).values())
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-5), name
    if options.get("beta"):  # TRL logs the mean of its groups' means, we the mean over all tokens
        found = [line["kl"] for line in history]
        assert found == pytest.approx(list(ours.metric("kl").values()), rel=0.05, abs=1e-6)
