"""Each way to tune, briefly: it begins as the base, learns, is kept and resumed.

All of it is in tests/methods.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.attempts_by_hand import run_here
from support.tiny_models import a_dataset, a_tiny_base
from support.tunings import (
    PROMPTED,
    TUNINGS,
    examples_of,
    mean_loss,
    plain_base,
    plain_result,
    tune_by,
)

from tuneyard.runners.adapter import add_adapter, parameter_groups, trained_parameters, tune
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.finetune import finetune
from tuneyard.runners.precision import Precision
from tuneyard.specs.exits import ExitCode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"), hidden=64)


BRIEFLY = (
    "lora", "dora", "pissa", "additional", "oft", "adalora", "vera", "ia3", "prefix", "p_tuning",
    "prompt_tuning", "full", "freeze", "freeze-parts",
)  # fmt: skip


@pytest.mark.parametrize("name", BRIEFLY)
def test_it_begins_as_the_base_is_kept_as_it_learned_and_resumed(tmp_path, base, name):
    more: dict[str, Any] = {"disable_shuffling": True, "max_steps": 4}
    ran = tune_by(tmp_path, base, name, save_steps=2, **more)
    assert ran.code == ExitCode.DONE, ran.failure
    rows = examples_of(base, tmp_path / "rows.jsonl")
    if name not in PROMPTED:
        own = mean_loss(plain_base(base), rows[:4])
        assert ran.metric("loss")[1] == pytest.approx(own, rel=1e-5)
    assert ran.metric("loss")[3] < ran.metric("loss")[1]
    assert mean_loss(plain_result(ran, base), rows) < mean_loss(plain_base(base), rows)
    half = ran.workdir / "checkpoints" / "step-2"
    again = tune_by(tmp_path, base, name, resume=half, **more)
    assert weights(again.workdir / "output") == weights(ran.workdir / "output")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_base_of_few_bits_learns_by_an_adapter(tmp_path, base):
    ran = tune_by(tmp_path, base, "qlora-nf4", max_steps=3, disable_shuffling=True)
    assert ran.code == ExitCode.DONE, ran.failure
    assert ran.metric("loss")[3] < ran.metric("loss")[1]
    whole = tune_by(tmp_path, base, "lora", max_steps=1, disable_shuffling=True)
    assert ran.metric("loss")[1] == pytest.approx(whole.metric("loss")[1], rel=0.05)
    assert ran.metric("loss")[1] != whole.metric("loss")[1]


def arguments(name: str, **more: Any) -> FinetuneArguments:
    return FinetuneArguments(**dict(TUNINGS[name]) | more)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "vera", "p_tuning", "prefix", "oft"])
def test_what_learns_begins_the_same_in_every_precision(base, name):
    models = [
        add_adapter(model, arguments(name), seed=3, precision=precision)
        for model, precision in (
            (plain_base(base), Precision("float32")),
            (plain_base(base, dtype=torch.bfloat16), Precision("bfloat16")),
        )
    ]
    begins = [trained_parameters(model) for model in models]
    fixed = [dict(m.named_buffers()) for m in models]
    for key in (n for n in fixed[0] if "vera_" in n):
        assert torch.equal(fixed[0][key], fixed[1][key]), key
    random = [n for n in begins[0] if "magnitude" not in n]  # dora's sizes are the base's own
    assert random
    for key in random:
        assert torch.equal(begins[0][key], begins[1][key]), key
    assert {p.dtype for p in begins[1].values()} == {torch.float32}


def test_chance_before_changes_no_beginning(base):
    for name in ("lora", "adalora", "vera", "pissa", "p_tuning"):
        begins = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = add_adapter(
                plain_base(base), arguments(name), seed=3, precision=Precision("float32")
            )
            begins.append(model.state_dict())
        assert all(torch.equal(begins[0][key], begins[1][key]) for key in begins[0]), name


def test_lora_plus_lets_b_learn_faster_and_norms_do_not_decay(base):
    groups = parameter_groups(
        add_adapter(
            plain_base(base),
            arguments("lora+", lora_target="q_proj,embed_tokens"),
            seed=0,
            precision=Precision("float32"),
        ),
        arguments("lora+", learning_rate=1e-3, weight_decay=0.1),
    )
    scales = sorted((g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups)
    assert scales == [(1e-3, 0.1, 1), (1.0, 0.1, 3), (4.0, 0.1, 2)]
    whole = tune(
        plain_base(base), arguments("full"), seed=0, precision=Precision("float32"), steps=1
    )
    groups = parameter_groups(whole, arguments("full", weight_decay=0.1))
    assert sorted((g["weight_decay"], len(g["params"])) for g in groups) == [(0.0, 5), (0.1, 16)]
    assert {g["lr_scale"] for g in groups} == {1.0}


@pytest.mark.parametrize(
    ("more", "field", "said"),
    [
        ({"freeze_trainable_modules": "mpl"}, "freeze_trainable_modules", "nearest is mlp"),
        ({"freeze_extra_modules": "embedtokens"}, "freeze_extra_modules", "embed_tokens"),
        (
            {"use_llama_pro": True, "freeze_trainable_layers": 3},
            "freeze_trainable_layers",
            "one of 1, 2",
        ),
        ({"finetuning_type": "oft", "oft_target": "q_prj"}, "oft_target", "nearest is q_proj"),
        (
            {"finetuning_type": "lora", "pissa_init": True, "lora_rank": 65},
            "lora_rank",
            "at most 32",
        ),
    ],
)
def test_what_the_base_does_not_have_is_refused_in_a_sentence(base, more, field, said):
    asked = FinetuneArguments(**{"finetuning_type": "freeze"} | more)
    with pytest.raises(BadSpec) as refused:
        tune(plain_base(base), asked, seed=0, precision=Precision("float32"))
    assert refused.value.field == field
    assert said in (refused.value.hint or "")


def test_rows_beyond_the_bases_positions_are_told(tmp_path, base):
    rows = a_dataset(tmp_path / "long", [{"instruction": "cat " * 600, "output": "meow"}])
    inputs = {"model": base, "dataset": rows}
    for more, told in (({}, 1), ({"cutoff_len": 512}, 0)):
        ran = run_here(tmp_path, finetune, inputs=inputs, arguments={"max_steps": 1} | more)
        said = [each["message"] for each in ran.of_type("warning")]
        assert ["cutoff_len = 512 would cut them" in each for each in said] == [True] * told


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"oft_block_size": 7}, "oft_block_size = 7 does not divide"),
        ({"oft_block_size": 0, "oft_rank": 5}, "oft_rank = 5 does not divide"),
        ({"oft_block_size": 8}, None),
    ],
)
def test_blocks_of_another_size_than_asked_are_told(tmp_path, base, sizes, said):
    warned = tune_by(tmp_path, base, "oft", max_steps=1, **sizes).of_type("warning")
    assert [said in each["message"] for each in warned] == [True] * bool(said)


def test_blocks_that_are_left_out_take_no_part_in_a_step(tmp_path, base):
    more = {"module_dropout": 0.5, "max_steps": 4, "disable_shuffling": True}
    whole = tune_by(tmp_path, base, "oft", **more | {"module_dropout": 0.0})
    ran = tune_by(tmp_path, base, "oft", **more, save_steps=2)
    assert ran.metric("loss")[1] == whole.metric("loss")[1]  # nothing is turned yet
    assert 0 < ran.metric("grad_norm")[1] < whole.metric("grad_norm")[1]
    again = tune_by(tmp_path, base, "oft", resume=ran.workdir / "checkpoints" / "step-2", **more)
    assert weights(again.workdir / "output") == weights(ran.workdir / "output")


def test_an_evaluation_in_between_changes_nothing_over_a_quantised_base(tmp_path, base):
    more: dict[str, Any] = {"val_size": 2, "max_steps": 3}
    plain = tune_by(tmp_path, base, "qlora-nf4", **more)
    looked = tune_by(tmp_path, base, "qlora-nf4", eval_strategy="steps", eval_steps=1, **more)
    assert plain.adapter_sha256 == looked.adapter_sha256


def test_noise_on_embeddings_is_for_every_way_to_tune(tmp_path, base):
    for name in ("lora", "full", "prompt_tuning"):
        quiet, noisy = (
            tune_by(tmp_path, base, name, max_steps=1, disable_shuffling=True, **noise)
            for noise in ({}, {"neftune_noise_alpha": 5.0})
        )
        assert noisy.code == ExitCode.DONE
        assert noisy.metric("loss")[1] != quiet.metric("loss")[1]
