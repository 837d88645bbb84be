"""What the engine does over each family of models, tiny and random: fp32, on the CPU.

make test-methods runs this; a part of it, over three families, stands in
tests/unit/test_runner_packing.py.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from support.attempts_by_hand import Ran, run_here
from support.families import FAMILIES, WINDOW, a_family_base
from support.gradients import (
    GRADIENT,
    LOSS,
    a_model,
    by_engine,
    by_rows,
    distance,
    random_examples,
)
from support.tiny_models import ROWS, a_dataset

from tuneyard.checks.models import model_facts
from tuneyard.runners.adapter import find_targets
from tuneyard.runners.attention import FAMILIES as SHOWN
from tuneyard.runners.attention import attend_by
from tuneyard.runners.base_model import load_class, load_weights, read_config
from tuneyard.runners.batches import collate
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.merge import merge
from tuneyard.specs.errors import InputError
from tuneyard.specs.finetune import FinetuneSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

LENGTHS = [21, 5, 3 * WINDOW, 12, 9, 17, 6, 4 * WINDOW]
KINDS = [
    kind
    for kind in get_args(FinetuneSpec.model_fields["finetuning_type"].annotation)
    if kind in ("lora", "full")
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bases by family, made when asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = a_family_base(folder / family, family)
        return made[family]

    return base


def plain_weights(base: Path) -> Any:
    return load_weights(base, read_config(base), dtype=torch.float32, device="cpu")


def test_all_families_that_may_share_rows_are_tried_here(bases):
    """And no other."""
    assert {read_config(bases(family))["model_type"] for family in FAMILIES} == SHOWN


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_a_shared_row_are_those_of_rows_of_their_own(bases, family):
    examples = random_examples(LENGTHS)
    plain, shared = plain_weights(bases(family)), plain_weights(bases(family))
    attend_by(shared, "segments")
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([e.ids]), use_cache=False) for e in examples]
        found = collate(examples, 2, shared=True).read_by(shared).logits[0]
    torch.testing.assert_close(
        found, torch.cat([each.logits[0] for each in expected]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["answers", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_that_transformers_computes_row_by_row(bases, family, kind):
    """Of answers alone, and of all tokens, as with train_on_prompt and stage pt."""
    examples = random_examples(LENGTHS, kind=kind)
    reference = a_model(bases(family))
    reference.get_base_model().set_attn_implementation("eager")
    expected = by_rows(reference, examples)
    for way in ("padded", "segments"):
        model = a_model(bases(family), way)
        for rows_per_group in (8, 2):  # accumulation of 1 and 4
            found = by_engine(
                model, examples, shared=way != "padded", rows_per_group=rows_per_group
            )
            loss, gradient = distance(found, expected)
            assert loss <= LOSS, (way, rows_per_group)
            assert gradient <= GRADIENT, (way, rows_per_group)


TARGETS = {
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "glm": ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    "glm4": ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    "mixtral": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen3_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "gpt_oss": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen2_moe": [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "shared_expert_gate", "up_proj",
        "v_proj",
    ],
}  # fmt: skip
USUAL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
EXPERTS = {"mixtral": ["gate_up_proj", "down_proj"], "qwen3_moe": ["gate_up_proj"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_means_every_linear_layer_that_the_family_has(bases, family):
    assert find_targets(plain_weights(bases(family)), "all") == TARGETS.get(family, USUAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_submission_is_checked_against_the_layers_that_can_be_adapted(bases, family):
    """Of headers alone: what files name otherwise than transformers does is not among them."""
    assert model_facts(bases(family))["linear_modules"] == TARGETS.get(family, USUAL)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_with_what_an_admin_can_do(tmp_path, where):
    base = a_family_base(tmp_path / "base", "phi3")
    config = json.loads((base / where).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (base / where).write_text(json.dumps(config))
    with pytest.raises(BadSpec, match="would run code") as refused:
        read_config(base)
    assert "an admin adds a copy of the folder without auto_map" in (refused.value.hint or "")
    if where == "config.json":
        with pytest.raises(InputError, match="code of its own") as at_submission:
            model_facts(base)
        assert "an admin" in at_submission.value.as_dict()["hint"]


def test_a_family_that_this_transformers_lacks_is_refused_with_what_an_admin_can_do():
    with pytest.raises(BadSpec, match="has no TomorrowForCausalLM") as refused:
        load_class({"architectures": ["TomorrowForCausalLM"]})
    assert "an admin can install a newer one" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in EXPERTS.items() for name in names]
)
def test_experts_are_refused_as_targets_with_what_can_be_one(bases, family, name):
    with pytest.raises(BadSpec, match="all experts of a layer in one tensor") as refused:
        find_targets(plain_weights(bases(family)), name)
    assert refused.value.field == "lora_target"
    assert "q_proj" in (refused.value.hint or "")


@pytest.fixture
def run(tmp_path):
    """Run one of the runners in this process."""

    def run(work: Any, kind: str, inputs: dict[str, Path], **arguments: Any) -> Ran:
        ran = run_here(tmp_path, work, kind=kind, inputs=inputs, seed=42, arguments=arguments)
        assert ran.code == 0, ran.events
        return ran

    return run


QUESTIONS = "\n".join(row["instruction"] for row in ROWS[:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_rows_to_a_model_that_answers(tmp_path, bases, run, family, kind):
    """Tuned with rows shared and not, asked, merged where there is something to merge."""
    base, rows = bases(family), a_dataset(tmp_path / "rows.jsonl")
    inputs = {"model": base, "dataset": rows}
    arguments = {
        "finetuning_type": kind, "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 0.003,
    }  # fmt: skip
    shared = run(finetune, "finetune", inputs, **arguments)
    padded = run(finetune, "finetune", inputs, attention="padded", **arguments)
    assert shared.metric("loss") == pytest.approx(padded.metric("loss"), rel=1e-4)
    assert shared.metric("loss")[3] != shared.metric("loss")[1]
    codes = {warning["code"] for warning in shared.of_type("warning")}
    assert codes == ({"experts_left"} if kind == "lora" and _has_experts(base) else set())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(QUESTIONS)
    output = shared.workdir / "output"
    answering = {"temperature": 0, "max_new_tokens": 12}
    if kind == "full":
        said = run(infer, "inference", {"model": output, "prompts": prompts}, **answering)
        assert len(said.results) == 3
        return
    with_adapter = {"model": base, "adapter": output, "prompts": prompts}
    said = run(infer, "inference", with_adapter, **answering)
    merged = run(merge, "merge", {"model": base, "adapter": output}, dtype="float32")
    folder = merged.workdir / "output"
    again = run(infer, "inference", {"model": folder, "prompts": prompts}, **answering)
    assert [row["text"] for row in again.results] == [row["text"] for row in said.results]
    _same_logits(base, output, folder)


def _has_experts(base: Path) -> bool:
    config = read_config(base)
    return "num_experts_per_tok" in config


def _same_logits(base: Path, adapter: Path, merged: Path) -> None:
    """The merged folder, read by plain transformers, computes what base and adapter do."""
    ids = torch.tensor([random_examples([3 * WINDOW])[0].ids])
    tuned = PeftModel.from_pretrained(plain_weights(base), str(adapter)).eval()
    alone = load_class(json.loads((merged / "config.json").read_text())).from_pretrained(
        merged, dtype=torch.float32, attn_implementation=tuned.config._attn_implementation
    )
    with torch.no_grad():
        found, before = alone(ids).logits, plain_weights(base)(ids).logits
        torch.testing.assert_close(found, tuned(ids).logits, rtol=0, atol=1e-4)
    assert float((found - before).abs().max()) > 1e-3
