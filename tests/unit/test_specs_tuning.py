"""What a fine-tune may say of what learns: LLaMA-Factory's names, every mistake with its mend."""

from typing import Any

import pytest

from tuneyard.specs.errors import SpecRejected
from tuneyard.specs.finetune import FinetuneSpec, shapers_changed
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.tuning import MERGEABLE, PROMPTS, WHOLE, use_refused

FINETUNE = {"kind": "finetune", "model": "base", "dataset": "data"}
JOB = "job_" + "0" * 32


def tuned(**more: Any) -> FinetuneSpec:
    """A fine-tune as it is understood."""
    spec = read_spec(FINETUNE | more)[0]
    assert isinstance(spec, FinetuneSpec)
    return spec


def refused(**more: Any) -> tuple[str, str, str]:
    """Field, code and mend of the one thing that is wrong."""
    with pytest.raises(SpecRejected) as found:
        read_spec(FINETUNE | more)
    (problem,) = found.value.problems
    assert problem.hint
    return problem.field or "", problem.code, problem.hint


def notes(**more: Any) -> dict[str, str]:
    return {note.field: note.message for note in read_spec(FINETUNE | more)[1]}


@pytest.mark.parametrize("kind", sorted({*MERGEABLE, *WHOLE, *PROMPTS}))
def test_every_type_of_tuning_is_taken(kind: str) -> None:
    assert tuned(finetuning_type=kind).finetuning_type == kind


def test_llama_factorys_defaults_are_kept() -> None:
    spec = tuned()
    assert (spec.freeze_trainable_layers, spec.freeze_trainable_modules) == (2, "all")
    assert (spec.oft_rank, spec.oft_block_size, spec.oft_target) == (0, 32, "all")
    assert (spec.pissa_iter, spec.loraplus_lr_ratio, spec.loraplus_lr_embedding) == (16, None, 1e-6)
    assert (spec.quantization_type, spec.double_quantization) == ("nf4", True)


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("qlora", "lora with quantization_bit: 4"),
        ("dora", "lora with use_dora: true"),
        ("rslora", "lora with use_rslora: true"),
        ("lora+", "lora with loraplus_lr_ratio: 16"),
        ("pissa", "lora with pissa_init: true"),
        ("prefix-tuning", "prefix"),
    ],
)
def test_other_words_for_a_way_to_tune_are_answered_with_the_right_ones(
    said: str, mend: str
) -> None:
    assert refused(finetuning_type=said) == ("finetuning_type", "bad_choice", f"use {mend}")


def test_p_tuning_is_also_written_with_a_hyphen() -> None:
    assert tuned(finetuning_type="p-tuning").finetuning_type == "p_tuning"


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_a_quantised_base_cannot_learn_itself(kind: str) -> None:
    field, code, hint = refused(finetuning_type=kind, quantization_bit=4)
    assert (field, code) == ("quantization_bit", "conflicting_fields")
    assert "finetuning_type lora" in hint


@pytest.mark.parametrize("kind", ["full", "freeze", "oft", "vera", "prompt_tuning"])
@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "pissa_init", "loraplus_lr_ratio"])
def test_what_is_loras_alone_is_refused_elsewhere(kind: str, field: str) -> None:
    value: Any = 4.0 if field == "loraplus_lr_ratio" else True
    hint = "finetuning_type lora, or leave it out"
    assert refused(**{"finetuning_type": kind, field: value}) == (field, "conflicting_fields", hint)


@pytest.mark.parametrize(
    ("more", "field", "code", "said"),
    [
        ({"adapter": "a,b,a"}, "adapter", "conflicting_fields", "name each once"),
        (
            {"lora_target": "q_proj,v_proj", "additional_target": ["v_proj"]},
            "additional_target",
            "conflicting_fields",
            "name it in one",
        ),
        ({"pissa_init": True, "quantization_bit": 4}, "pissa_init", "conflicting_fields", "leave"),
        (
            {"adapter": "a", "create_new_adapter": True, "quantization_bit": 8},
            "create_new_adapter", "conflicting_fields", "leave quantization_bit out",
        ),
        (
            {"adapter": "a,b", "quantization_bit": 4},
            "adapter", "conflicting_fields", "merge the others first",
        ),
        ({"quantization_bit": 3}, "quantization_bit", "bad_choice", "bits"),
        ({"quantization_bit": 4, "finetuning_type": "vera"}, "quantization_bit",
         "conflicting_fields", "finetuning_type lora or oft"),
        ({"resize_vocab": True}, "resize_vocab", "not_supported_yet", "leave it out"),
        ({"quantization_method": "hqq"}, "quantization_method", "not_supported_yet", "leave"),
        ({"create_new_adapter": True}, "adapter", "missing_field", "name an adapter"),
        ({"adapter": "a", "finetuning_type": "full"}, "adapter", "conflicting_fields", "merge it"),
        ({"adapter": "a", "pissa_init": True}, "pissa_init", "conflicting_fields", "create_new"),
        ({"adapter": "a,b", "finetuning_type": "oft"}, "adapter", "conflicting_fields", "merge"),
        (
            {"adapter": "a", "create_new_adapter": True, "use_dora": True},
            "use_dora", "conflicting_fields", "merge them first",
        ),
        ({"adapter": "a,../x"}, "adapter[1]", "path_not_allowed", "tuned model"),
        ({"adapter": []}, "adapter", "out_of_range", "go on"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "freeze_trainable_layers",
         "nothing_to_do", "above 0"),
        ({"finetuning_type": "freeze", "use_llama_pro": True, "freeze_trainable_layers": -1},
         "freeze_trainable_layers", "out_of_range", "1 or more"),
        ({"use_llama_pro": True, "layers_to_transform": [1]}, "use_llama_pro",
         "conflicting_fields", "one of them"),
        ({"use_llama_pro": True, "finetuning_type": "oft"}, "use_llama_pro",
         "conflicting_fields", "lora or freeze"),
        ({"finetuning_type": "ia3", "layers_to_transform": [0]}, "layers_to_transform",
         "conflicting_fields", "lora or oft"),
        ({"finetuning_type": "oft", "oft_rank": 4}, "oft_rank", "conflicting_fields", "to 0"),
        ({"use_dora": True, "quantization_bit": 8}, "use_dora",
         "conflicting_fields", "quantization_bit: 4"),
        ({"finetuning_type": "prefix", "gradient_checkpointing": True}, "gradient_checkpointing",
         "conflicting_fields", "prompt_tuning"),
        ({"finetuning_type": "prefix", "stage": "dpo"}, "finetuning_type",
         "conflicting_fields", "lora"),
        ({"finetuning_type": "full", "stage": "rm"}, "finetuning_type",
         "conflicting_fields", "lora"),
        ({"adapter": "a", "stage": "rm"}, "adapter", "conflicting_fields", "merge the other first"),
        ({"pissa_init": True, "stage": "kto"}, "pissa_init", "conflicting_fields", "leave it out"),
        ({"pissa_init": True, "stage": "rm"}, "pissa_init", "conflicting_fields", "leave it out"),
        ({"pissa_init": True, "use_dora": True}, "pissa_init",
         "conflicting_fields", "leave it out"),
        ({"pissa_init": True, "additional_target": "lm_head"}, "pissa_init",
         "conflicting_fields", "leave it out"),
        ({"finetuning_type": "oft", "oft_block_size": 1}, "oft_block_size",
         "nothing_to_do", "2 or more"),
        ({"stage": "rm", "val_size": 2, "eval_strategy": "steps", "compute_accuracy": True,
          "metric_for_best_model": "accuracy"}, "metric_for_best_model",
         "bad_choice", "rewards/accuracies"),
        ({"finetuning_type": "adalora", "adalora_init_rank": 8}, "adalora_init_rank",
         "out_of_range", "above 8"),
        ({"num_virtual_tokens": 0, "finetuning_type": "prefix"}, "num_virtual_tokens",
         "out_of_range", "vectors"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_work_are_refused_with_the_mend(
    more: dict[str, Any], field: str, code: str, said: str
) -> None:
    found = refused(**more)
    assert found[:2] == (field, code)
    assert said in found[2]


def test_a_base_that_pissa_changes_is_no_reference_and_learns_where_none_is_asked() -> None:
    drawn = {"reward_funcs": ["json_valid"], "pissa_init": True}
    for more in ({"stage": "rloo"}, {"stage": "grpo", "beta": 0.04}):
        assert refused(**drawn, **more)[:2] == ("pissa_init", "conflicting_fields")
    assert tuned(**drawn, stage="grpo").pissa_init
    assert tuned(stage="dpo", pref_loss="orpo", pissa_init=True).pissa_init


def test_adapters_are_named_in_a_list_or_with_commas() -> None:
    for named in ("a, b", ["a", "b"]):
        spec = tuned(adapter_name_or_path=named)
        assert spec.adapters == ["a", "b"]
        found = [(r.field, r.use) for r in spec.references() if r.what == "adapter"]
        assert found == [("adapter", "sum"), ("adapter_2", "lora")]
        model = next(r for r in spec.references() if r.field == "model")
        assert model.fits == ("adapter", "adapter_2")
    spec = tuned(adapter=[{"from": JOB}], create_new_adapter=True)
    assert [(r.value, r.use) for r in spec.references()][-1] == ({"from": JOB}, "sum")
    assert "adapter" not in tuned(adapter="a").arguments()


def test_fields_that_a_way_to_tune_does_not_read_are_noted() -> None:
    said = notes(finetuning_type="full", lora_rank=4, freeze_trainable_layers=1)
    assert said["lora_rank"] == "lora_rank has no effect with finetuning_type full"
    assert set(said) == {"lora_rank", "freeze_trainable_layers"}
    assert set(notes(adapter="a", lora_rank=4)) == {"lora_rank"}
    assert notes(adapter="a", create_new_adapter=True, lora_rank=4) == {}
    assert "freeze_trainable_layers" not in notes(use_llama_pro=True, freeze_trainable_layers=2)
    assert "twice the rank" in notes(pissa_init=True)["pissa_init"]


def test_fields_that_a_stage_does_not_look_at_are_noted() -> None:
    assert notes(pref_beta=0.2)["pref_beta"] == "pref_beta has no effect in stage sft"
    assert notes(eval_steps=2)["eval_steps"] == "eval_steps has no effect: eval_strategy is no"
    assert "eval_steps" not in notes(eval_steps=2, eval_strategy="steps", val_size=2)
    alone = "per_device_train_batch_size"
    assert "set 2 or more" in notes(stage="kto", per_device_train_batch_size=1)[alone]
    assert alone not in notes(stage="kto", per_device_train_batch_size=2)
    assert set(notes(stage="kto", pref_loss="ipo", kto_chosen_weight=2.0)) == {"pref_loss"}
    assert notes(stage="dpo", pref_loss="simpo", simpo_gamma=1.0) == {}
    assert notes(adapter_name_or_path="a") == {}


def test_preferences_over_an_adapter_say_what_they_are_compared_with() -> None:
    said = notes(adapter_name_or_path="a", stage="dpo")["adapter"]
    assert "create_new_adapter: true" in said
    assert notes(adapter="a", stage="dpo") == {}  # with itself as it began
    assert notes(adapter_name_or_path="a", stage="dpo", reference="start") == {}
    assert notes(adapter="a", stage="dpo", create_new_adapter=True) == {}
    assert notes(adapter="a", stage="dpo", ref_model="b") == {}
    assert notes(adapter="a", stage="dpo", pref_loss="orpo") == {}


def test_an_adapters_maker_decides_what_it_is_fit_for() -> None:
    assert use_refused("merge", {}) is None
    assert use_refused("merge", {"finetuning_type": "prefix"})
    assert use_refused("merge", {"stage": "rm"}) == use_refused("lora", {"stage": "rm"})
    assert use_refused("speak", {"stage": "rm"}) == use_refused("merge", {"stage": "rm"})
    assert use_refused("speak", {"finetuning_type": "prefix"}) is None
    assert use_refused("lora", {"use_dora": True}) is None
    assert use_refused("sum", {"use_dora": True})
    assert use_refused("oft", {"finetuning_type": "oft"}) is None
    assert use_refused("oft", {}) == (
        "It was made by finetuning_type lora, and this goes on by oft.",
        "finetuning_type lora",
    )


@pytest.mark.parametrize("kind", ["full", "freeze", "prefix", "p-tuning", "prompt_tuning"])
def test_an_export_of_what_cannot_be_merged_is_refused_by_its_type(kind: str) -> None:
    document = {"model_name_or_path": "b", "adapter_name_or_path": "a", "export_dir": "out"}
    with pytest.raises(SpecRejected) as found:
        read_spec(document | {"finetuning_type": kind})
    (problem,) = found.value.problems
    assert (problem.field, problem.code) == ("finetuning_type", "not_mergeable")
    assert problem.hint


def test_a_checkpoint_fits_no_steps_of_another_number_of_rows_where_epochs_count() -> None:
    size, parts = "per_device_train_batch_size", "gradient_accumulation_steps"
    before = tuned(**{size: 4})
    assert shapers_changed(before, tuned(**{size: 1})) == [size]
    assert shapers_changed(before, tuned(**{size: 4, parts: 2})) == [parts]
    assert shapers_changed(before, tuned(**{size: 1, parts: 4})) == []  # the same rows a step
    assert shapers_changed(tuned(**{size: 4}, max_steps=9), tuned(**{size: 1}, max_steps=9)) == []
