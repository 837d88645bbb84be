"""Stages grpo and rloo: advantages by hand, gradients by the textbook, draws, and going on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attempts_by_hand import run_here
from support.online import QUESTIONS, SHORT
from support.tiny_models import a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.batches import collate
from tuneyard.runners.examples import IGNORED, Drawn, Example
from tuneyard.runners.finetune import finetune
from tuneyard.runners.online import GrpoLoss, RlooLoss, grpo_advantages, rloo_advantages
from tuneyard.runners.precision import Precision
from tuneyard.runners.prepare import prepare
from tuneyard.runners.reference import Reference
from tuneyard.runners.rollouts import _ByChance

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "questions.jsonl", QUESTIONS)


@pytest.fixture
def tune(tmp_path: Path, base: Path, dataset: Path):
    def run(*, resume=None, inputs=None, **arguments: Any):
        return run_here(
            tmp_path,
            finetune,
            inputs={"model": base, "dataset": dataset} | (inputs or {}),
            seed=42,
            resume=resume and str(resume),
            arguments=SHORT | arguments,
        )

    return run


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0], [1.0, 1.0, 1.0, 1.0]])


def test_grpo_compares_an_answer_with_its_group():
    # Group 2: mean 5, deviation of a sample sqrt(20/3); group 3 teaches nothing.
    expected = [-3 / (math.sqrt(20 / 3) + 1e-4), -1 / (math.sqrt(20 / 3) + 1e-4)]
    found = grpo_advantages(REWARDS.double(), scale="group")
    assert found[1, :2].tolist() == pytest.approx(expected, abs=1e-12)
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, abs=1e-12)
    assert found[2].tolist() == [0, 0, 0, 0]


def test_grpo_divides_by_whose_deviation_is_asked_for():
    rewards = REWARDS.double()
    plain = grpo_advantages(rewards, scale="none")
    assert plain[1].tolist() == [-3, -1, 1, 3]
    deviation = torch.std(rewards.flatten()) + 1e-4
    assert torch.allclose(grpo_advantages(rewards, scale="batch"), plain / deviation)


def test_rloo_compares_an_answer_with_the_mean_of_the_others():
    found = rloo_advantages(REWARDS.double(), normalized=False)
    third = 1 / 3
    assert found[0].tolist() == pytest.approx([1, -third, -third, -third], abs=1e-12)
    assert found[1].tolist() == pytest.approx([2 - 6, 4 - 16 / 3, 6 - 14 / 3, 8 - 4], abs=1e-12)
    assert found[2].tolist() == [0, 0, 0, 0]
    normalized = rloo_advantages(REWARDS.double(), normalized=True)
    assert float(normalized.mean()) == pytest.approx(0, abs=1e-12)
    assert float(normalized.std()) == pytest.approx(1, abs=1e-4)


def answers() -> list[Drawn]:
    """Four answers of unequal length to one question, with advantages that do not cancel out."""
    asked, said = [1, 40, 41, 42], [[50, 51, 2], [60, 2], [70, 71, 72, 73, 2], [80, 81]]
    labels = [IGNORED] * len(asked)
    return [
        Drawn(Example(asked + ids, labels + ids), advantage)
        for ids, advantage in zip(said, [1.5, -0.5, 0.25, -1.0], strict=True)
    ]


def a_model(base: Path):
    """The tiny base with an adapter that changes it."""
    weights = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = add_adapter(weights, FinetuneArguments(), seed=0, precision=Precision("float32"))
    torch.manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def logps_of(model, example: Example, temperature: float) -> torch.Tensor:
    """As a textbook has it: one row, full logits, the answer's tokens."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1] / temperature
    labels = torch.tensor(example.labels[1:])
    kept = labels != IGNORED
    return torch.log_softmax(logits[kept], -1).gather(1, labels[kept][:, None])[:, 0]


def textbook(model, form: str, *, beta: float, temperature: float) -> torch.Tensor:
    """Source: the papers' formulas, at the point where the model that drew is the one that learns.

    There the gradient of the ratio is that of log p, and the gradient of the distance's estimate
    that of the KL divergence: log p - log ref, as a constant, times the gradient of log p.
    """
    losses = []
    for drawn in answers():
        logps = logps_of(model, drawn.example, temperature)
        pulled = -drawn.advantage * logps
        if beta:
            with torch.no_grad(), model.disable_adapter():
                old = logps_of(model, drawn.example, temperature)
            pulled = pulled + beta * (logps.detach() - old) * logps
        losses.append(pulled)
    if form == "grpo":
        return torch.stack([each.mean() for each in losses]).mean()
    if form == "rloo":
        return torch.stack([each.sum() for each in losses]).mean()
    return torch.cat(losses).sum() / {"dapo": 12, "dr_grpo": 4 * 5}[form]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(
    ("form", "beta"), [("dapo", 0.1), ("grpo", 0.1), ("grpo", 0.0), ("dr_grpo", 0.1), ("rloo", 0)]
)
def test_gradients_are_those_of_the_policy_gradient(base, form, beta, rows):
    model, temperature = a_model(base), 0.7
    textbook(model, form, beta=beta, temperature=temperature).backward()
    expected = gradients(model)
    reference = Reference() if beta else None
    objective: Any = RlooLoss(temperature)
    if form != "rloo":
        objective = GrpoLoss(form, beta, temperature, longest=5, reference=reference)
    units = sum(map(objective.units, answers()))
    for start in range(0, 4, rows):
        batch = collate(answers()[start : start + rows], pad_id=2)
        (objective.loss(model, batch).loss / units).backward()
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, name


def test_the_loss_begins_at_the_advantages_and_the_distance_at_0(tune):
    ran = tune(beta=0.1, scale_rewards="none", max_steps=2)
    assert ran.metric("kl")[1] == 0.0
    assert ran.metric("kl")[2] > 0.0
    alone = tune(loss_type="grpo", scale_rewards="none", max_steps=1)
    assert alone.metric("loss")[1] == pytest.approx(0.0, abs=1e-7)  # advantages sum up to 0
    rloo = tune(stage="rloo", max_steps=2)
    assert rloo.metric("kl")[1] == 0.0


def test_tokens_are_drawn_as_often_as_the_model_says():
    torch.manual_seed(3)
    logits, temperature, count = torch.randn(1, 12) * 2, 0.8, 20_000
    chances = torch.rand(count, 1, dtype=torch.float64)
    scores = _ByChance(chances, 5, temperature)(torch.zeros(count, 5), logits.expand(count, -1))
    assert (scores > -math.inf).sum(1).eq(1).all()
    found = torch.bincount(scores.argmax(1), minlength=12) / count
    assert torch.allclose(found, (logits[0] / temperature).softmax(-1), atol=0.01)


def test_a_token_that_cannot_be_is_never_drawn():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, -math.inf]]).expand(3, -1)
    chances = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    scores = _ByChance(chances, 0, 1.0)(torch.zeros(3, 0), logits)
    assert scores.argmax(1).tolist() == [1, 1, 1]


def test_what_is_drawn_does_not_depend_on_how_answers_are_grouped(tune):
    whole = tune(max_steps=1)
    parts = tune(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    for name in ("reward", "completions/mean_length", "rewards/regex/std"):
        assert parts.metric(name) == whole.metric(name)
    assert parts.metric("grad_norm")[1] == pytest.approx(whole.metric("grad_norm")[1], rel=1e-4)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_reward_that_can_be_learned_rises(tune, stage):
    ran = tune(stage=stage, max_steps=20, beta=0.0)
    rewards = ran.metric("reward")
    assert ran.code == 0, ran.failure
    assert rewards[1] < 0.5
    assert sum(rewards[step] for step in (18, 19, 20)) / 3 > 0.85


def test_a_stopped_run_goes_on_to_the_same_bytes(tune):
    whole = tune(save_steps=2, lora_dropout=0.1, beta=0.1)
    rest = tune(
        resume=whole.workdir / "checkpoints" / "step-2", lora_dropout=0.1, beta=0.1, save_steps=2
    )
    assert rest.code == 0, rest.failure
    assert sorted(rest.metric("reward")) == [3, 4]
    assert rest.adapter_sha256 == whole.adapter_sha256


def test_a_run_from_prepared_questions_is_the_run_from_rows(tune, tmp_path, base, dataset):
    inputs = {"model": base, "dataset": dataset}
    made = run_here(tmp_path, prepare, kind="prepare", inputs=inputs, arguments={"stage": "grpo"})
    assert made.code == 0, made.failure
    rows = tune(max_steps=2, reward_funcs=["contains"])
    tokens = tune(
        max_steps=2, reward_funcs=["contains"], inputs={"tokens": made.workdir / "output"}
    )
    assert rows.code == tokens.code == 0, tokens.events
    assert rows.adapter_sha256 == tokens.adapter_sha256


def test_held_out_questions_are_judged_by_the_reward_of_their_answers(tune):
    asked = {"val_size": 2.0, "eval_strategy": "steps", "eval_steps": 2}
    ran = tune(**asked)
    rewards, losses = ran.metric("eval_reward"), ran.metric("eval_loss")
    assert sorted(rewards) == [0, 2, 4]
    assert losses == {step: -reward for step, reward in rewards.items()}
    again = tune(**asked)
    assert again.metric("eval_reward") == rewards
    assert again.adapter_sha256 == ran.adapter_sha256


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ({"reward_funcs": [{"name": "exact_match", "column": "gold"}]}, 65, "line 1"),
        ({"max_completion_length": 500}, 65, "No question fits"),
        ({"cutoff_len": 8}, 65, "cutoff_len is 8"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(tune, arguments, code, said):
    ran = tune(**arguments)
    assert ran.code == code
    assert said in ran.failure["evidence"]


def test_questions_that_leave_no_room_are_left_out(tune, tmp_path):
    long = {"prompt": "why? " * 120, "answer": "a"}
    rows = a_dataset(tmp_path / "mixed.jsonl", [*QUESTIONS, long])
    ran = tune(inputs={"dataset": rows}, max_steps=1)
    assert ran.code == 0, ran.failure
    (warned,) = [each for each in ran.of_type("warning") if each["code"] == "rows_skipped"]
    assert warned["message"].startswith("1 of 9 questions do not fit")
