"""Training is the plain recipe: its gradients, its losses, its ends. Tiny models, fp32, CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import LLAMA, ROWS, a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners import precision
from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments, InferArguments
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import chat_of
from tuneyard.runners.examples import IGNORED, Cutting, Example, encode
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.losses import TokenLoss
from tuneyard.runners.precision import Precision, choose_precision
from tuneyard.runners.rows import read_conversations
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.fields import OF_THE_JOB, WHAT
from tuneyard.specs.finetune import FinetuneSpec
from tuneyard.specs.inference import InferenceSpec
from tuneyard.store.folder import read_manifest, verify_folder

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
SHORT = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def tune(tmp_path, base, dataset):
    """Fine-tune the tiny base on the eight rows, with these arguments."""

    def run(
        *, seed: int = 42, resume: Path | None = None, job: str = "job_by_hand", **arguments
    ) -> Ran:
        inputs = {"model": base, "dataset": dataset}
        inputs |= {
            k: arguments.pop(k) for k in ("model", "dataset", "eval_dataset") if k in arguments
        }
        return run_here(
            tmp_path,
            finetune,
            inputs=inputs,
            input_ids={"model": "tiny"},
            job=job,
            seed=seed,
            resume=resume and str(resume),
            arguments=SHORT | arguments,
        )

    return run


def examples_of(base: Path, dataset: Path, **cutting) -> list[Example]:
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    return encode(read_conversations(dataset), chat, Cutting(**cutting)).examples


def a_model(
    base: Path, *, random: bool = True, seed: int = 0, precision=Precision("float32"), **arguments
):
    """The tiny base with an adapter, whose B is random rather than 0 if asked."""
    weights = LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, precision.weights))
    model = add_adapter(weights, FinetuneArguments(**arguments), seed=seed, precision=precision)
    torch.manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if random and ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def plain_loss(model, examples: list[Example]) -> torch.Tensor:
    """The recipe as a textbook has it: one row at a time, full logits, one mean."""
    losses = []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        kept = labels != IGNORED
        losses.append(
            torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")
        )
    return torch.cat(losses).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("rows_per_batch", [8, 2])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_gradients_are_those_of_the_plain_recipe(base, dataset, rows_per_batch, train_on_prompt):
    examples = examples_of(base, dataset, train_on_prompt=train_on_prompt)
    assert len({len(e.ids) for e in examples}) > 3  # unequal lengths
    model = a_model(base)
    expected_loss = plain_loss(model, examples)
    expected_loss.backward()
    expected, expected_loss = gradients(model), expected_loss.detach()
    units, loss = sum(map(TokenLoss().units, examples)), 0.0
    for start in range(0, 8, rows_per_batch):
        batch = collate(examples[start : start + rows_per_batch], pad_id=2)
        part = TokenLoss().loss(model, batch).loss / units
        part.backward()
        loss += float(part.detach())
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, name


def test_a_batch_without_any_target_has_loss_0_and_gradients_0(base):
    model = a_model(base)
    empty = Example([5, 6, 7], [IGNORED] * 3)
    loss = TokenLoss().loss(model, collate([empty, empty], pad_id=2)).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(model).values())


def test_the_first_loss_is_the_bases_own(tune, base, dataset):
    ran = tune(disable_shuffling=True)
    with torch.no_grad():
        own = plain_loss(LlamaForCausalLM.from_pretrained(base), examples_of(base, dataset)[:4])
    assert ran.code == ExitCode.DONE
    assert ran.metric("loss")[1] == pytest.approx(float(own), rel=1e-5)


def test_accumulation_changes_nothing_but_the_size_of_groups(tune):
    whole = tune(per_device_train_batch_size=4)
    parts = tune(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert sorted(whole.metric("loss")) == [1, 2, 3]
    for step, loss in whole.metric("loss").items():
        assert parts.metric("loss")[step] == pytest.approx(loss, rel=1e-5)
        assert parts.metric("grad_norm")[step] == pytest.approx(
            whole.metric("grad_norm")[step], rel=1e-4
        )


def test_gradients_are_clipped_at_the_norm_of_all_together(tune):
    free, clipped = tune(max_grad_norm=0), tune(max_grad_norm=1e-3)
    assert free.metric("grad_norm")[1] == clipped.metric("grad_norm")[1] > 1e-3
    assert free.adapter_sha256 != clipped.adapter_sha256


def test_the_last_short_step_of_an_epoch_is_kept(tune):
    ran = tune(per_device_train_batch_size=3, max_steps=-1, num_train_epochs=2)
    assert [e["done"] for e in ran.of_type("progress")] == list(range(7))
    assert ran.metric("epoch")[6] == 2.0


def test_an_epoch_is_a_share_of_its_batches_as_in_transformers(tune):
    several = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    ran = tune(**several, max_steps=-1, num_train_epochs=2)  # 8 rows: batches of 3, 3 and 2
    assert [ran.metric("epoch")[i] for i in (1, 2, 3, 4)] == [2 / 3, 1, 1 + 2 / 3, 2]


def test_the_same_run_leaves_the_same_bytes(tune):
    first, second = tune(lora_dropout=0.1), tune(lora_dropout=0.1)
    one, two = (verify_folder(ran.workdir / "output") for ran in (first, second))
    assert one == two
    assert str(first.workdir) not in (first.workdir / "output" / "adapter_config.json").read_text()


def test_resume_points_at_any_step_alter_nothing(tune):
    plain = tune(lora_dropout=0.1)
    often = tune(lora_dropout=0.1, save_steps=1)
    assert often.adapter_sha256 == plain.adapter_sha256


def test_evaluation_alters_nothing_and_begins_with_the_base(tune, base, dataset):
    plain = tune(lora_dropout=0.1)
    measured = tune(
        lora_dropout=0.1, eval_dataset=dataset, **EVERY_STEP, per_device_eval_batch_size=3
    )
    assert measured.adapter_sha256 == plain.adapter_sha256
    losses = measured.metric("eval_loss")
    with torch.no_grad():
        own = plain_loss(LlamaForCausalLM.from_pretrained(base), examples_of(base, dataset))
    assert sorted(losses) == [0, 1, 2, 3]
    assert losses[0] == pytest.approx(float(own), rel=1e-5)
    assert losses[3] < losses[0]


def test_a_share_is_held_out_for_validation(tune):
    once = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 6}
    ran = tune(val_size=0.25, eval_strategy="epoch", **once)
    assert [e["done"] for e in ran.of_type("progress")] == [0, 1]
    assert sorted(ran.metric("eval_loss")) == [0, 1]


def test_held_out_rows_are_not_looked_at_unless_a_strategy_says_when(tune):
    ran = tune(val_size=0.25, eval_steps=1)
    assert (ran.code, ran.metric("eval_loss")) == (ExitCode.DONE, {})


def test_the_adapter_begins_the_same_however_the_run_is_made(base):
    begins = [
        a_model(base, random=False),
        a_model(base, random=False, lora_dropout=0.3),
        a_model(base, random=False, per_device_train_batch_size=1),
        a_model(base, random=False, precision=Precision("bfloat16")),
        a_model(base, random=False, lora_target="q_proj"),
        a_model(base, random=False, layers_to_transform=[1]),
    ]
    reference = trained_parameters(begins[0])
    for model in begins[1:]:
        for name, parameter in trained_parameters(model).items():
            assert torch.equal(parameter, reference[name]), name
            assert parameter.dtype == torch.float32
    other = trained_parameters(a_model(base, random=False, seed=1))
    assert not torch.equal(*(next(iter(each.values())) for each in (reference, other)))


def test_the_scale_is_twice_the_rank_unless_set(base):
    config = a_model(base, lora_rank=16).peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 32)


def test_all_means_every_linear_layer_but_the_last(base):
    targets = a_model(base).peft_config["default"].target_modules
    assert "lm_head" not in targets
    assert len(targets) == 7


@pytest.mark.parametrize(
    ("arguments", "field", "said"),
    [
        ({"lora_target": "q_porj,v_proj"}, "lora_target", "nearest is q_proj"),
        ({"layers_to_transform": [9]}, "lora_target", "Target modules"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "did you mean cosine"),
        ({"lora_rank": 0}, "lora_rank", "out of range: 1 to 1,024"),
        ({"stage": "ppo"}, "stage", "sft"),
        ({"bf16": True, "fp16": True}, "bf16", "bf16 and fp16 exclude each other"),
        ({"mask_history": True, "train_on_prompt": True}, "train_on_prompt", "exclude"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs", "num_decay_steps"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "there are none"),
        ({"stage": "grpo"}, "reward_funcs", "what an answer is worth"),
        ({"stage": "dpo", "packing": True}, "packing", "no meaning in stage dpo"),
        ({"stage": "rm", "watch_prompts": ["Who?"]}, "watch_prompts", "says nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tune, arguments, field, said):
    ran = tune(**arguments)
    assert ran.code == ExitCode.BAD_SPEC
    assert ran.failure["cause"] == "bad_spec"
    assert field in ran.failure["evidence"]
    assert said in ran.failure["evidence"]
    assert not (ran.workdir / "output").exists()


def test_unknown_arguments_are_named_in_a_warning(tune):
    ran = tune(lora_ranks=4, kind="finetune")
    (warning,) = ran.of_type("warning")
    assert "lora_ranks" in warning["message"]
    assert "kind" not in warning["message"]


def test_a_template_that_the_base_brings_itself_is_said_to_be_used(tune):
    (warning,) = tune(template="baichuan").of_type("warning")
    assert "its own chat template" in warning["message"]


def test_a_template_of_another_family_is_told(base, tune, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    config = bare / "tokenizer_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"chat_template": None}))
    (warning,) = tune(model=bare, template="llama3").of_type("warning")
    assert warning["code"] == "foreign_template"
    assert "<|eot_id|>" in warning["message"]
    assert tune(model=bare, template="chatml").of_type("warning") == []


def test_a_bad_row_ends_with_65_and_its_line(tune, tmp_path):
    path = a_dataset(tmp_path / "bad", [*ROWS, {"instruction": "x"}])
    ran = tune(dataset=path)
    assert ran.code == ExitCode.BAD_DATA
    assert "line 9" in ran.failure["evidence"]


def test_a_missing_input_ends_with_66(tune, tmp_path):
    assert tune(dataset=tmp_path / "gone").code == ExitCode.INPUT_GONE


def test_a_loss_that_is_no_number_ends_with_72(tune):
    ran = tune(learning_rate=10.0, lora_alpha=10**6, max_grad_norm=0, max_steps=20)
    assert ran.code == ExitCode.LOSS_NOT_FINITE
    assert "learning_rate" in ran.failure["evidence"]


OVERFIT = {
    "lora_rank": 16, "learning_rate": 0.01, "max_steps": 200, "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine", "save_strategy": "no",
}  # fmt: skip


@pytest.mark.parametrize("template", ["chatml", "llama"])
def test_eight_rows_are_learned_and_said_again_token_for_token(tune, tmp_path, template):
    base = a_tiny_base(
        tmp_path / "base", hidden=64, **({} if template == "chatml" else {"template": LLAMA})
    )
    tuned = tune(model=base, **OVERFIT)
    assert tuned.metric("loss")[200] < 0.05
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row["instruction"]) + "\n" for row in ROWS))
    said = run_here(
        tmp_path,
        infer,
        inputs={"model": base, "adapter": tuned.workdir / "output", "prompts": prompts},
        arguments={"temperature": 0, "max_new_tokens": 60, "batch_size": 3},
    )
    assert [row["text"] for row in said.results] == [row["output"] for row in ROWS]
    assert {row["finish_reason"] for row in said.results} == {"stop"}


def test_the_adapter_loads_with_peft_and_says_what_the_trained_model_says(tune, base, dataset):
    ran = tune(learning_rate=0.05)
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), str(ran.workdir / "output")
    )
    examples = examples_of(base, dataset)
    again = tune(learning_rate=0.05, eval_dataset=dataset, eval_strategy="epoch")
    with torch.no_grad():
        assert float(plain_loss(model, examples)) == pytest.approx(
            again.metric("eval_loss")[3], rel=1e-5
        )
    origin = json.loads((ran.workdir / "output" / "tuneyard.json").read_text())
    assert origin["base"]["id"] == "tiny"
    assert origin["stop_tokens"] == ["<|im_end|>"]
    assert "im_start" in origin["template"]


def checkpoints(ran: Ran) -> list[str]:
    return sorted(p.name for p in (ran.workdir / "checkpoints").iterdir())


def kept(ran: Ran) -> list[dict[str, Any]]:
    """The events of the two newest checkpoints."""
    return ran.of_type("checkpoint")[-2:]


def test_the_last_two_checkpoints_and_the_best_are_kept(tune, dataset):
    ran = tune(save_steps=1, max_steps=6)
    assert checkpoints(ran) == ["step-5", "step-6"]
    assert [read_manifest(ran.workdir / e["path"]).get("eval_loss") for e in kept(ran)] == [
        None
    ] * 2
    rising = tune(save_steps=1, max_steps=6, eval_dataset=dataset, **EVERY_STEP, learning_rate=5.0)
    losses = rising.metric("eval_loss")
    best = min(range(1, 7), key=losses.__getitem__)
    assert set(checkpoints(rising)) == {f"step-{best}", "step-5", "step-6"}
    for event in kept(rising):
        manifest = verify_folder(rising.workdir / event["path"])
        assert manifest["eval_loss"] == losses[event["step"]]


def test_a_resumed_run_ends_in_the_same_bits(tune, tmp_path):
    options = {
        "lora_dropout": 0.1,
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "save_steps": 2,
    }
    whole = tune(**options, save_total_limit=9)
    for step in (2, 4, 6):
        resumed = tune(**options, resume=whole.workdir / "checkpoints" / f"step-{step}")
        assert resumed.adapter_sha256 == whole.adapter_sha256
        assert sorted(resumed.metric("loss")) == list(range(step + 1, 7))
        log = "output/trainer_log.jsonl"
        assert (resumed.workdir / log).read_text() == (whole.workdir / log).read_text()


def test_a_damaged_or_foreign_checkpoint_is_refused(tune, tmp_path, dataset):
    whole = tune(save_steps=1)
    folder = whole.workdir / "checkpoints" / "step-2"
    other = a_dataset(tmp_path / "other", ROWS[:5])
    assert "other data" in tune(resume=folder, dataset=other).failure["evidence"]
    assert "another adapter" in tune(resume=folder, lora_rank=4).failure["evidence"]
    tensors = folder / "optimizer.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    damaged = tune(resume=folder)
    assert damaged.code == ExitCode.INPUT_GONE
    assert "optimizer.safetensors has changed" in damaged.failure["evidence"]


def test_a_checkpoint_of_another_job_that_does_not_fit_is_left_aside(tune, tmp_path):
    folder = tune(job="job_origin", save_steps=1).workdir / "checkpoints" / "step-2"
    other = a_dataset(tmp_path / "other", ROWS[:5])
    for changed, why in (
        ({"lora_rank": 4}, "another adapter"),
        ({"dataset": other}, "other data"),
        ({"max_steps": 1}, "at step 2, beyond the 1 steps"),
    ):
        begun = tune(job="job_retry", resume=folder, **changed)
        (warning,) = [e for e in begun.events if e.get("code") == "resume_ignored"]
        assert why in warning["message"]
        assert begun.adapter_sha256 == tune(**changed).adapter_sha256
        assert why in tune(job="job_origin", resume=folder, **changed).failure["evidence"]


def test_dropout_noise_and_dora_train(tune):
    plain = tune()
    for option in ({"lora_dropout": 0.3}, {"neftune_noise_alpha": 5}, {"use_dora": True}):
        other = tune(**option)
        assert other.code == ExitCode.DONE
        assert other.adapter_sha256 != plain.adapter_sha256


def test_gradient_checkpointing_changes_no_loss(tune):
    plain, lean = tune(), tune(gradient_checkpointing=True)
    for step, loss in plain.metric("loss").items():
        assert lean.metric("loss")[step] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("asked", "base", "device", "expected"),
    [
        ({}, "bfloat16", "cpu", ("bfloat16", "float32")),
        ({}, "float32", "cuda", ("float32", "float32")),
        ({}, None, "cpu", ("float32", "float32")),
        ({"precision": "bf16"}, "float32", "cpu", ("bfloat16", "float32")),
        ({"precision": "bf16", "pure_bf16": True}, "float32", "cuda", ("bfloat16", "bfloat16")),
        ({"precision": "fp16"}, "float32", "cpu", ("float32", "float32")),
        ({"precision": "fp16"}, "float32", "cuda", ("float16", "float32")),
        ({"precision": "fp32"}, "bfloat16", "cuda", ("float32", "float32")),
    ],
)
def test_precision_is_what_was_asked_else_the_bases_own(asked, base, device, expected):
    chosen = choose_precision(**{"precision": "auto"} | asked, base=base, device=device)
    assert (chosen.weights, chosen.trained) == expected


def test_fp16_on_a_cpu_says_that_it_is_fp32(tune):
    ran = tune(fp16=True)
    assert "fp32" in ran.of_type("warning")[0]["message"]


def test_a_processor_without_bf16_gets_fp32_unless_bf16_was_asked_for():
    told = {"precision": "auto", "base": "bfloat16", "device": "cpu", "has_bf16": False}
    assert choose_precision(**told) == Precision("float32")
    asked = choose_precision(**told | {"precision": "bf16"})
    assert asked.weights == "bfloat16"
    assert "many times as long" in (asked.note or "")


@pytest.mark.parametrize(("has", "weights"), [(True, "bfloat16"), (False, "float32")])
def test_a_bf16_base_is_tuned_in_what_the_processor_has(
    tune, tmp_path, monkeypatch, caplog, has, weights
):
    caplog.set_level("INFO")
    monkeypatch.setattr(precision, "has_bf16", lambda _device: has)
    bare = a_tiny_base(tmp_path / "half", dtype="bfloat16")
    for asked, expected in (({}, weights), ({"bf16": True}, "bfloat16")):
        ran = tune(model=bare, max_steps=1, **asked)
        assert f"frozen weights in {expected}" in caplog.text
        caplog.clear()
        assert len(ran.of_type("warning")) == (expected == "bfloat16" and not has)


def test_a_gpu_without_bf16_gets_fp16_with_scaling():
    chosen = choose_precision(precision="auto", base="bfloat16", device="cuda", has_bf16=False)
    assert (chosen.weights, chosen.autocast) == ("float16", True)


def test_a_runner_by_hand_has_the_defaults_of_a_submission():
    for by_hand, spec in ((FinetuneArguments, FinetuneSpec), (InferArguments, InferenceSpec)):
        beside = {"seed", *WHAT}
        for name in spec.model_fields.keys() - beside:
            assert by_hand.model_fields[name].default == spec.model_fields[name].default, name


def test_an_adapter_tells_the_arguments_of_the_runner_alone(tune):
    ran = tune()
    said = json.loads((ran.workdir / "output" / "tuneyard.json").read_text())["arguments"]
    assert said["lora_rank"] == 8
    assert said.keys().isdisjoint(OF_THE_JOB | WHAT.keys())
