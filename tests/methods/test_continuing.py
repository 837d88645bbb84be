"""Going on: from one adapter, from several, over a tuned model; what answers are compared with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import PAIRS, a_dataset, a_tiny_base
from support.tunings import (
    SHORT,
    TUNINGS,
    examples_of,
    mean_loss,
    plain_base,
    plain_result,
    tune_by,
)
from transformers import MixtralConfig, MixtralForCausalLM

from tuneyard.runners.batches import split
from tuneyard.runners.finetune import finetune
from tuneyard.runners.merge import merge
from tuneyard.specs.exits import ExitCode

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ROW = {"max_steps": 2, "disable_shuffling": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.fixture(scope="module")
def first(tmp_path_factory, base) -> Path:
    """A LoRA on q_proj alone, of another rank and scale than the defaults."""
    folder = tmp_path_factory.mktemp("first")
    more: dict[str, Any] = {"lora_target": "q_proj", "lora_rank": 3, "use_rslora": True}
    ran = tune_by(folder, base, "lora", **more)
    assert ran.code == ExitCode.DONE
    return ran.workdir / "output"


@pytest.fixture(scope="module")
def second(tmp_path_factory, base, first) -> Path:
    """A new LoRA over the first: what is published holds both."""
    folder = tmp_path_factory.mktemp("second")
    ran = tune_by(folder, base, "lora", adapters=(first,), create_new_adapter=True, **ROW)
    assert ran.code == ExitCode.DONE, ran.failure
    return ran.workdir / "output"


def test_an_adapter_goes_on_from_where_it_was(tmp_path, base, first):
    ran = tune_by(tmp_path, base, "lora", adapters=(first,), lora_rank=64, **ROW)
    assert ran.code == ExitCode.DONE, ran.failure
    own = mean_loss(plain_with(base, first), examples_of(base, tmp_path / "rows.jsonl")[:4])
    assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)
    config = json.loads((ran.workdir / "output" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["target_modules"]) == (3, True, ["q_proj"])
    assert json.loads((ran.workdir / "output" / "tuneyard.json").read_text())["adapters"] == [None]


def plain_with(base: Path, *adapters: Path) -> Any:
    """The base with adapters merged into it one after the other, by peft."""
    model = plain_base(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model


def test_a_new_adapter_begins_as_what_lies_below_it(tmp_path, base, first):
    ran = tune_by(tmp_path, base, "lora", adapters=(first,), create_new_adapter=True, **ROW)
    assert ran.code == ExitCode.DONE, ran.failure
    own = mean_loss(plain_with(base, first), examples_of(base, tmp_path / "rows.jsonl")[:4])
    assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)


def test_the_result_over_others_stands_over_the_untouched_base(tmp_path, base, first):
    more = {"val_size": 4, "eval_strategy": "epoch"}
    ran = tune_by(tmp_path, base, "lora", adapters=(first,), create_new_adapter=True, **more)
    assert ran.code == ExitCode.DONE, ran.failure
    held = list(split(examples_of(base, tmp_path / "rows.jsonl"), 4, seed=42)[1])
    loss = mean_loss(plain_result(ran, base), held)
    assert loss == pytest.approx(ran.metric("eval_loss")[6], rel=2e-5)
    merged = run_here(
        tmp_path,
        merge,
        kind="merge",
        inputs={"model": base, "adapter": ran.workdir / "output"},
        arguments={"dtype": "float32"},
    )
    assert merged.code == ExitCode.DONE
    assert not merged.of_type("warning")  # summed tensor by tensor
    assert mean_loss(plain_base(merged.workdir / "output"), held) == pytest.approx(loss, rel=1e-5)


def test_of_several_all_but_the_last_lie_below(tmp_path, base, first, second):
    ran = tune_by(tmp_path, base, "lora", adapters=(first, second), **ROW)
    assert ran.code == ExitCode.DONE, ran.failure
    own = mean_loss(plain_with(base, first, second), examples_of(base, tmp_path / "rows.jsonl")[:4])
    assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)


def test_a_run_over_others_resumes_in_the_same_bits(tmp_path, base, first, second):
    adapters, more = (first, second), {"save_steps": 2, "create_new_adapter": True}
    whole = tune_by(tmp_path, base, "lora", adapters=adapters, **more)
    step = whole.workdir / "checkpoints" / "step-4"
    again = tune_by(tmp_path, base, "lora", adapters=adapters, resume=step, **more)
    assert again.adapter_sha256 == whole.adapter_sha256


def test_an_oft_adapter_goes_on(tmp_path, base):
    before = tune_by(tmp_path, base, "oft")
    output = before.workdir / "output"
    ran = tune_by(tmp_path, base, "oft", adapters=(output,), **ROW)
    own = mean_loss(plain_with(base, output), examples_of(base, tmp_path / "rows.jsonl")[:4])
    assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)


def test_over_a_quantised_base_one_adapter_goes_on(tmp_path, base, first):
    ran = tune_by(tmp_path, base, "qlora-nf4", adapters=(first,), **ROW)
    assert ran.code == ExitCode.DONE, ran.failure
    config = json.loads((ran.workdir / "output" / "adapter_config.json").read_text())
    assert config["r"] == 3


@pytest.mark.parametrize("name", ["dora", "additional", "oft"])
def test_what_is_no_sum_of_factors_cannot_lie_below(tmp_path, base, name):
    below = tune_by(tmp_path, base, name).workdir / "output"
    ran = tune_by(tmp_path, base, "lora", adapters=(below,), create_new_adapter=True)
    assert ran.code == ExitCode.BAD_DATA
    assert "merge it first" in ran.failure["evidence"]


def test_a_whole_model_is_tuned_on_like_any_base(tmp_path, base):
    whole = tune_by(tmp_path, base, "full").workdir / "output"
    ran = tune_by(tmp_path, whole, "freeze", **ROW)
    own = mean_loss(plain_base(whole), examples_of(base, tmp_path / "rows.jsonl")[:4])
    assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)
    over = tune_by(tmp_path, whole, "lora", **ROW)
    assert over.metric("loss")[1] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "oft", "adalora", "vera", "ia3", "dora"])
def test_reward_heads_and_preferences_learn_by_any_adapter(tmp_path, base, name):
    for stage in ("dpo", "rm"):
        ran = judged(tmp_path, base, name, stage)
        assert ran.code == ExitCode.DONE, ran.failure
        if stage == "dpo":
            assert ran.metric("loss")[1] == pytest.approx(0.6931472, rel=1e-5)


@pytest.mark.parametrize("name", ["full", "freeze", "qlora-nf4"])
def test_preferences_are_compared_with_the_base_as_it_began(tmp_path, base, name):
    ran = judged(tmp_path, base, name, "dpo")
    assert ran.code == ExitCode.DONE, ran.failure
    assert ran.metric("loss")[1] == pytest.approx(0.6931472, rel=1e-5)
    assert ran.metric("loss")[2] < 0.69


def judged(folder: Path, base: Path, name: str, stage: str) -> Ran:
    rows = folder / "pairs.jsonl"
    return run_here(
        folder,
        finetune,
        inputs={"model": base, "dataset": a_dataset(rows, PAIRS)},
        arguments=SHORT | {"max_steps": 2, "stage": stage} | dict(TUNINGS[name]),
    )


def test_a_new_adapters_preferences_are_compared_with_what_lies_below(tmp_path, base, first):
    rows = a_dataset(tmp_path / "pairs.jsonl", PAIRS)
    inputs = {"model": base, "dataset": rows, "adapter": first}
    arguments = {"stage": "dpo", "create_new_adapter": True, "max_steps": 1}
    ran = run_here(tmp_path, finetune, inputs=inputs, arguments=arguments)
    assert ran.metric("loss")[1] == pytest.approx(0.6931472, rel=1e-5)
    arguments = {"stage": "dpo", "max_steps": 1, "reference": "base"}
    with_base = run_here(tmp_path, finetune, inputs=inputs, arguments=arguments)
    assert with_base.metric("loss")[1] != pytest.approx(0.6931472, rel=1e-3)


def test_bf16_keeps_what_learns_in_fp32_and_rounds_once(tmp_path, base):
    for name in ("full", "freeze", "additional"):
        ran = tune_by(tmp_path, base, name, bf16=True, save_steps=3)
        assert ran.code == ExitCode.DONE, ran.failure
        kept = ran.workdir / "checkpoints" / "step-6"
        trained = kept / "trained.safetensors"
        tensors = load_file(trained if trained.exists() else kept / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert ran.metric("loss")[6] < ran.metric("loss")[1]
        resumed = tune_by(
            tmp_path, base, name, bf16=True, resume=ran.workdir / "checkpoints" / "step-3"
        )
        assert load_equal(resumed, ran)


def load_equal(one: Ran, other: Ran) -> bool:
    a, b = (
        {k: v for p in sorted((r.workdir / "output").glob("*.safetensors"))
         for k, v in load_file(p).items()}
        for r in (one, other)
    )  # fmt: skip
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_base_in_bf16_stays_in_bf16(tmp_path):
    base = a_tiny_base(tmp_path / "bf16", hidden=64, dtype="bfloat16")
    output = tune_by(tmp_path, base, "full").workdir / "output"
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, output))
    theta = before["rope_parameters"]["rope_theta"]
    assert after == before | {"rope_theta": theta}  # where transformers 4 looks for it


def test_a_family_whose_tensors_are_named_otherwise_on_disk_is_tuned_whole(tmp_path):
    base = a_tiny_base(tmp_path / "moe", hidden=64)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=259, num_local_experts=4, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.save_pretrained(base)
    names = load_file(base / "model.safetensors").keys()
    assert not {name for name, _ in model.named_parameters()} <= names
    for name in ("full", "freeze"):
        ran = tune_by(tmp_path, base, name, **ROW)
        assert ran.code == ExitCode.DONE, ran.failure
        output = ran.workdir / "output"
        assert load_file(output / "model.safetensors").keys() == names
        again = tune_by(tmp_path, base, name, save_steps=2, val_size=4, eval_strategy="epoch")
        held = list(split(examples_of(base, tmp_path / "rows.jsonl"), 4, seed=42)[1])
        loss = mean_loss(plain_base(again.workdir / "output"), held)
        assert loss == pytest.approx(again.metric("eval_loss")[6], rel=2e-5)
