"""Each way to tune: its exact start, its end, and that it is kept, loaded, merged and resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_tiny_base
from support.tunings import (
    MERGEABLE,
    PROMPTED,
    QUANTISED,
    TUNINGS,
    WHOLE,
    examples_of,
    loss_of_a_batch,
    mean_loss,
    plain_base,
    plain_result,
    tune_by,
)
from transformers import BitsAndBytesConfig

from tuneyard.runners.batches import split
from tuneyard.runners.infer import infer
from tuneyard.runners.merge import merge
from tuneyard.specs.exits import ExitCode

pytestmark = [
    # peft asks transformers for a property that transformers renamed: no affair of ours.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, base):
    """One run of each way, with checkpoints at every second step, evaluated at its ends."""
    runs: dict[str, Ran] = {}
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Ran:
        if name not in runs:
            # The rows are there once a first run has written them.
            rows = folder / "rows.jsonl"
            measured: dict[str, Any] = {"save_steps": 2, "save_total_limit": 9}
            runs[name] = tune_by(folder, base, name, disable_shuffling=True, **measured)
            assert runs[name].code == ExitCode.DONE, runs[name].failure
            assert rows.exists()
        return runs[name]

    return run


def rows_of(run: Ran) -> Path:
    return run.workdir.parent / "rows.jsonl"


def quantised(name: str) -> dict[str, Any]:
    """How plain transformers loads the base that a way trains over."""
    arguments = TUNINGS[name]
    if "quantization_bit" not in arguments:
        return {}
    if arguments["quantization_bit"] == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_type=arguments.get("quantization_type", "nf4"),
            bnb_4bit_use_double_quant=arguments.get("double_quantization", True),
        )
    return {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}


@pytest.mark.parametrize("name", sorted(TUNINGS.keys() - set(PROMPTED)))
def test_the_first_loss_is_the_bases_own(ran, base, name):
    model = plain_base(base, **quantised(name)).train()  # bitsandbytes multiplies otherwise then
    own = mean_loss(model, examples_of(base, rows_of(ran(name)))[:4])
    assert ran(name).metric("loss")[1] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("name", sorted(TUNINGS))
def test_it_learns(ran, name):
    losses = ran(name).metric("loss")
    assert losses[5] < losses[1]
    assert losses[6] < losses[2]


@pytest.mark.parametrize("name", sorted(TUNINGS))
def test_what_is_kept_says_what_was_trained(tmp_path, ran, base, name):
    again = tune_by(
        tmp_path, base, name,
        eval_dataset=None, disable_shuffling=True, val_size=4, eval_strategy="epoch",
    )  # fmt: skip
    assert again.code == ExitCode.DONE, again.failure
    # The four rows that were held out, found by what the base says of all sets of them.
    model = plain_result(again, base, **quantised(name))
    held = held_out(again, base)
    measure = loss_of_a_batch if name == "qlora-int8" else mean_loss
    assert measure(model, held) == pytest.approx(again.metric("eval_loss")[6], rel=2e-5)


def held_out(run: Ran, base: Path):
    return list(split(examples_of(base, rows_of(run)), 4, seed=42)[1])


@pytest.mark.parametrize("name", sorted(TUNINGS))
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, ran, base, name):
    whole = ran(name)
    for step in (2, 4):
        resumed = tune_by(
            tmp_path, base, name,
            disable_shuffling=True, resume=whole.workdir / "checkpoints" / f"step-{step}",
        )  # fmt: skip
        assert resumed.code == ExitCode.DONE, resumed.failure
        assert digests(resumed) == digests(whole)
        assert sorted(resumed.metric("loss")) == list(range(step + 1, 7))


def digests(run: Ran) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run.workdir / "output").glob("*.safetensors"))
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_it_says_the_same(tmp_path, ran, base, name):
    adapter = ran(name).workdir / "output"
    inputs = {"model": base, "adapter": adapter}
    merged = run_here(tmp_path, merge, kind="merge", inputs=inputs, arguments={"dtype": "float32"})
    assert merged.code == ExitCode.DONE, merged.failure
    said = json.loads((merged.workdir / "output" / "tuneyard.json").read_text())
    bits = TUNINGS[name].get("quantization_bit")
    assert said["adapter"].get("trained_over_bits") == bits
    tuned = logits(PeftModel.from_pretrained(plain_base(base), str(adapter)).eval())
    assert (logits(plain_base(merged.workdir / "output")) - tuned).abs().max() < 1e-4
    assert (logits(plain_base(base)) - tuned).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(TUNINGS))
def test_it_answers_prompts(tmp_path, ran, base, name):
    output = ran(name).workdir / "output"
    inputs = {"model": output} if name in WHOLE else {"model": base, "adapter": output}
    arguments = {"prompts": ["What does a cat say?", "Who are you, and why?"], "temperature": 0}
    said = run_here(
        tmp_path,
        infer,
        kind="inference",
        inputs=inputs,
        arguments=arguments | {"max_new_tokens": 8},
    )
    assert said.code == ExitCode.DONE, said.failure
    # Batched and padded as they are: greedily the same as each prompt alone.
    alone = run_here(
        tmp_path, infer, kind="inference", inputs=inputs,
        arguments=arguments | {"max_new_tokens": 8, "batch_size": 1},
    )  # fmt: skip
    assert [row["text"] for row in said.results] == [row["text"] for row in alone.results]


@pytest.mark.parametrize("name", PROMPTED)
def test_learned_vectors_begin_as_what_the_seed_says(tmp_path, base, name):
    first = tune_by(tmp_path, base, name, max_steps=1, learning_rate=1e-9, disable_shuffling=True)
    model = plain_result(first, base)
    own = mean_loss(model, examples_of(base, rows_of(first))[:4])
    assert first.metric("loss")[1] == pytest.approx(own, rel=1e-4)
    other = tune_by(tmp_path, base, name, max_steps=1, disable_shuffling=True, seed=1)
    assert other.metric("loss")[1] != first.metric("loss")[1]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_the_bases_folder_with_other_weights(ran, base, name):
    output = ran(name).workdir / "output"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / file).read_bytes() == (base / file).read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (base, output))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    layer = {"full": None, "freeze": 1, "freeze-parts": 0, "freeze-pro": 1}[name]
    part = ".mlp." if name == "freeze-parts" else ""
    expected = {k for k in before if layer is None or f".layers.{layer}{part or '.'}" in k}
    extra = {"lm_head.weight", "model.norm.weight"} if name == "freeze-parts" else set()
    assert changed == expected | extra
    origin = json.loads((output / "tuneyard.json").read_text())
    assert origin["base"]["id"] == "tiny"


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_no_part_of_the_result(ran, name):
    output = ran(name).workdir / "output"
    names = load_file(output / "adapter_model.safetensors").keys()
    assert all("lora_" in each or "oft_" in each for each in names)
    assert "quantization_bit" in (output / "tuneyard.json").read_text()
