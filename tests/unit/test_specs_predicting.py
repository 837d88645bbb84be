"""do_eval, do_predict and watch-prompts: which documents mean what, and what is refused."""

from typing import Any

import pytest

from tuneyard.checks.submission import check_evaluate
from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.evaluate import EvaluateSpec
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.jobs import read_spec

FINETUNE = {"kind": "finetune", "model": "m", "dataset": "d"}
EVALUATE = {"kind": "evaluate", "model": "m", "eval_dataset": "d", "do_eval": True}
PREDICT = {"do_predict": True, "predict_with_generate": True}

LLAMAFACTORY = {
    "model_name_or_path": "llama3", "adapter_name_or_path": "support-tone", "stage": "sft",
    "do_predict": True, "finetuning_type": "lora", "eval_dataset": "identity",
    "template": "llama3", "cutoff_len": 2048, "max_samples": 50, "overwrite_cache": True,
    "preprocessing_num_workers": 16, "dataloader_num_workers": 4, "output_dir": "saves/predict",
    "overwrite_output_dir": True, "per_device_eval_batch_size": 1, "predict_with_generate": True,
    "ddp_timeout": 180000000,
}  # fmt: skip
"""The names that a file for LLaMA-Factory's prediction holds."""


def problems(document: dict[str, Any]) -> dict[str | None, tuple[str, str | None]]:
    with pytest.raises(SpecRejected) as refused:
        read_spec(document)
    return {each.field: (each.code, each.hint) for each in refused.value.problems}


def test_a_file_that_predicts_without_training_is_an_evaluation() -> None:
    spec, notes = read_spec(LLAMAFACTORY)
    assert isinstance(spec, EvaluateSpec)
    assert spec.arguments()["max_samples"] == 50
    assert {r.field: r.what for r in spec.references()} == {
        "model": "model",
        "adapter": "adapter",
        "eval_dataset": "dataset",
    }
    assert "trains nothing" in {n.field: n.message for n in notes}["finetuning_type"]
    again, _ = read_spec(spec.document())
    assert again == spec


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"do_train": False, "do_eval": True, "val_size": 0.1}, "evaluate"),
        ({"do_train": "no", **PREDICT, "val_size": 0.1}, "evaluate"),
        ({"do_train": True, **PREDICT, "val_size": 0.1}, "finetune"),
        ({"do_eval": True, "val_size": 0.1}, "finetune"),
    ],
)
def test_kind_finetune_trains_unless_it_says_otherwise(more: dict[str, Any], kind: str) -> None:
    assert read_spec(FINETUNE | more)[0].kind == kind


def test_a_file_without_kind_trains_where_it_names_something_to_learn() -> None:
    lines = {"model": "m", **PREDICT}
    assert read_spec(lines | {"dataset": "d", "val_size": 0.1})[0].kind == "finetune"
    assert read_spec(lines | {"eval_dataset": "d"})[0].kind == "evaluate"
    silent = lines | {"dataset": "d", "val_size": 0.1, "do_train": False}
    assert read_spec(silent)[0].kind == "evaluate"


def test_the_settings_of_generation_are_llamafactorys() -> None:
    spec, _ = read_spec(FINETUNE)
    assert isinstance(spec, FinetuneSpec)
    names = ("do_sample", "spoken_at", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    assert [getattr(spec, name) for name in names] == [True, 0.95, 0.7, 50, 1.0, 1024]


@pytest.mark.parametrize(
    ("document", "field", "code"),
    [
        (
            FINETUNE | {"do_predict": True, "val_size": 0.1},
            "predict_with_generate",
            "missing_field",
        ),
        (FINETUNE | PREDICT, "do_predict", "conflicting_fields"),
        (FINETUNE | {"do_eval": True}, "do_eval", "conflicting_fields"),
        (
            FINETUNE | {"predict_with_generate": True},
            "predict_with_generate",
            "conflicting_fields",
        ),
        (
            FINETUNE | PREDICT | {"compute_accuracy": True, "val_size": 2},
            "compute_accuracy",
            "conflicting_fields",
        ),
        (FINETUNE | {"do_train": False}, "do_train", "not_supported_yet"),
        (FINETUNE | {"eval_num_beams": 4}, "eval_num_beams", "not_supported_yet"),
        (FINETUNE | {"watch_prompts": []}, "watch_prompts", "out_of_range"),
        (FINETUNE | {"watch_prompts": "Who?"}, "watch_prompts", "wrong_type"),
        (FINETUNE | {"watch_prompts": ["a", " "]}, "watch_prompts[1]", "empty_prompt"),
        (FINETUNE | {"watch_prompts": ["a", "a"]}, "watch_prompts", "out_of_range"),
        (FINETUNE | {"watch_prompts": ["a"] * 17}, "watch_prompts", "out_of_range"),
        (FINETUNE | {"stage": "rm", "watch_prompts": ["a"]}, "watch_prompts", "conflicting_fields"),
        (EVALUATE | {"do_eval": False}, "do_eval", "nothing_to_do"),
        (EVALUATE | {"do_train": True}, "do_train", "conflicting_fields"),
        (EVALUATE | {"val_size": 2}, "val_size", "conflicting_fields"),
        (EVALUATE | {"stage": "dpo"}, "stage", "not_supported_yet"),
        (EVALUATE | {"bf16": True, "fp16": True}, "bf16", "conflicting_fields"),
        ({**EVALUATE, "eval_dataset": None, "dataset": "d"}, "do_eval", "conflicting_fields"),
    ],
)
def test_what_cannot_be_said_or_measured_is_refused_with_its_field(
    document: dict[str, Any], field: str, code: str
) -> None:
    found = problems(document)
    assert found[field][0] == code
    assert found[field][1]  # and its mend


@pytest.mark.parametrize("stage", ["pt", "dpo", "kto", "rm"])
def test_predictions_are_of_rows_with_answers(stage: str) -> None:
    found = problems(FINETUNE | PREDICT | {"stage": stage, "val_size": 2})
    assert {"do_predict", "predict_with_generate"} <= found.keys()


def test_what_has_no_effect_is_said() -> None:
    def noted(document: dict[str, Any]) -> set[str]:
        return {note.field for note in read_spec(document)[1]}

    assert noted(FINETUNE | {"temperature": 0.3}) == {"temperature"}
    assert noted(FINETUNE | {"compute_accuracy": True, "val_size": 2}) == {
        "compute_accuracy",
        "eval_strategy",
    }
    steps = {"eval_strategy": "steps", "val_size": 2, "predict_with_generate": True}
    assert noted(FINETUNE | steps) == {"predict_with_generate"}
    assert noted(FINETUNE | PREDICT | {"val_size": 2, "temperature": 0.3}) == set()


def test_rows_without_answers_are_refused_for_an_evaluation_too() -> None:
    spec, _ = read_spec(EVALUATE)
    assert isinstance(spec, EvaluateSpec)
    report = {"rows": 3, "kinds": {"preference": {"line": 2}}}
    (found,) = check_evaluate(spec, {"eval_dataset": report, "dataset": None})
    assert (found.code, found.field, found.line) == ("wrong_dataset_kind", "eval_dataset", 2)
    few, _ = read_spec({**EVALUATE, "eval_dataset": None, "dataset": "d", "val_size": 9})
    assert isinstance(few, EvaluateSpec)
    (found,) = check_evaluate(few, {"dataset": {"rows": 3, "rows_kind": "alpaca"}})
    assert (found.code, found.field) == ("too_few_rows", "val_size")
    long, _ = read_spec(EVALUATE | {"cutoff_len": 129})
    assert isinstance(long, EvaluateSpec)
    (found,) = check_evaluate(long, {}, {"max_position_embeddings": 128})
    assert (found.code, found.field) == ("too_long", "cutoff_len")


def test_a_file_that_trained_measures_too_whatever_it_says_of_learning() -> None:
    learning = {
        "optim": "adamw_torch",
        "use_muon": False,
        "report_to": "none",
        "plot_loss": True,
        "watch_prompts": ["Who are you?"],
        "learning_rate": 1e-4,
        "pref_loss": "sigmoid",
        "lora_rank": 8,
        "output_dir": "saves/measured",
    }
    spec, notes = read_spec(EVALUATE | learning)
    assert isinstance(spec, EvaluateSpec)
    assert {note.field for note in notes} == learning.keys()
