"""Stages grpo and rloo from end to end: what each option does, reward models, stops. CPU, fp32."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.attempts_by_hand import Ran, run_here, start_runner, wait_for_event
from support.online import LETTER, QUESTIONS, SHORT
from support.tiny_models import a_dataset, a_tiny_base
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import chat_of
from tuneyard.runners.examples import Cutting, Pair, Question, encode
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.judges import VALUE_HEAD, load_scorer
from tuneyard.runners.preferences import scores
from tuneyard.runners.rewards import Answered
from tuneyard.runners.rows import Unanswered, read_stage
from tuneyard.specs.exits import ExitCode

# peft asks transformers for a property that transformers renamed: no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def _pairs() -> list[dict[str, str]]:
    """Someone likes the first letters of the alphabet, and nothing else."""
    draw = random.Random(1)  # noqa: S311 - no secret

    def text(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(2, 6)))

    other = "nopqrstuvwxyz0123456789ABCDEFG"
    return [
        {"prompt": row["prompt"], "chosen": text("abcdefghijklm"), "rejected": text(other)}
        for row in QUESTIONS * 8
    ]


LIKED = _pairs()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "questions.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def liked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "liked.jsonl", LIKED)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, base: Path, liked: Path) -> Path:
    """What stage rm makes of it."""
    ran = run_here(
        tmp_path_factory.mktemp("rm"),
        finetune,
        inputs={"model": base, "dataset": liked},
        seed=42,
        arguments={"stage": "rm", "max_steps": 20, "learning_rate": 0.01},
    )
    assert ran.code == 0, ran.failure
    return ran.workdir / "output"


@pytest.fixture
def tune(tmp_path: Path, base: Path, dataset: Path):
    def run(*, inputs: Any = None, resume: Path | None = None, **arguments: Any) -> Ran:
        return run_here(
            tmp_path,
            finetune,
            inputs={"model": base, "dataset": dataset} | (inputs or {}),
            seed=42,
            resume=resume and str(resume),
            arguments=SHORT | {"max_steps": 20} | arguments,
        )

    return run


def ends_at(ran: Ran, name: str = "reward") -> float:
    """The mean of the last three steps."""
    assert ran.code == 0, ran.failure
    return sum(list(ran.metric(name).values())[-3:]) / 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none", "learning_rate": 0.05},
        {"beta": 0.001},
        {"temperature": 0.8},
        {"stage": "rloo", "beta": 0.0},
        {"stage": "rloo", "beta": 0.001, "normalize_advantages": True},
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"num_generations": 4},
    ],
    ids=str,
)
def test_every_way_to_compare_answers_learns(tune, arguments):
    ran = tune(**arguments)
    assert ran.metric("reward")[1] < 0.5
    assert ends_at(ran) > 0.8


def test_the_reference_draws_back(tune):
    free, held = tune(beta=0.0), tune(beta=5.0)
    assert ends_at(held) < ends_at(free)
    assert tune(stage="rloo", beta=5.0).metric("kl")[20] < 1.0


def test_weights_say_which_reward_counts(tune):
    functions = [LETTER, {"name": "length", "target": 1, "within": 6}]
    letters = tune(reward_funcs=functions, reward_weights=[1.0, 0.0])
    short = tune(reward_funcs=functions, reward_weights=[0.0, 1.0])
    assert ends_at(letters, "rewards/regex/mean") > ends_at(short, "rewards/regex/mean")
    assert ends_at(short, "completions/mean_length") < ends_at(letters, "completions/mean_length")
    for ran in (letters, short):
        weights = [1.0, 0.0] if ran is letters else [0.0, 1.0]
        parts = [ran.metric(f"rewards/{name}/mean") for name in ("regex", "length")]
        for step, reward in ran.metric("reward").items():
            mean = sum(w * part[step] for w, part in zip(weights, parts, strict=True))
            assert reward == pytest.approx(mean, abs=1e-9)


def test_answers_without_an_end_teach_nothing_if_asked(tune):
    ran = tune(mask_truncated_completions=True, max_completion_length=1, max_steps=2)
    clipped = ran.metric("completions/clipped_ratio")
    assert clipped[1] > 0.9
    if clipped[1] == 1.0:
        assert ran.metric("grad_norm")[1] == 0.0


def test_the_right_answer_of_a_row_is_learned_and_then_said(tune, tmp_path, base, dataset):
    """The column of the data decides; greedily asked, the tuned model says what pays."""
    ran = tune(
        reward_funcs=["contains"],
        max_steps=20,
        max_completion_length=4,
        per_device_train_batch_size=64,
        num_generations=16,
    )
    assert ran.metric("reward")[1] < 0.1
    assert ends_at(ran) > 0.7  # no adapter lets this head say one token surely
    asked = run_here(
        tmp_path,
        infer,
        kind="inference",
        inputs={"model": base, "adapter": ran.workdir / "output", "prompts": dataset},
        arguments={"temperature": 0, "max_new_tokens": 4},
    )
    said = [row["text"] for row in asked.results]
    assert all("a" in text for text in said), said


def test_sigterm_in_the_middle_of_an_answer_keeps_the_last_step_and_goes_on_to_the_same_bytes(
    tmp_path, base, dataset
):
    spec: dict[str, Any] = {
        "inputs": {"model": base, "dataset": dataset},
        "seed": 42,
        "arguments": SHORT | {"max_steps": 40, "lora_dropout": 0.1, "beta": 0.05},
    }
    whole = run_here(tmp_path, finetune, **spec)
    process, workdir = start_runner(tmp_path, "finetune", **spec)
    wait_for_event(process, workdir, lambda event: event["type"] == "metric" and event["step"] >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == ExitCode.STOPPED_AT_CHECKPOINT
    (kept,) = Ran(75, workdir).of_type("checkpoint")[-1:]
    rest = run_here(tmp_path, finetune, resume=str(workdir / kept["path"]), **spec)
    assert rest.code == 0, rest.failure
    assert min(rest.metric("reward")) == kept["step"] + 1
    assert rest.adapter_sha256 == whole.adapter_sha256
    assert not list(workdir.rglob("*.pt")) + list(workdir.rglob("*.bin"))


def test_a_reward_model_teaches_what_it_likes(tune, base, reward_model):
    inputs = {"reward_model": reward_model, "reward_base": base}
    ran = tune(inputs=inputs, reward_funcs=None, max_steps=25, learning_rate=0.01)
    rewards = ran.metric("reward")
    assert ran.code == 0, ran.failure
    assert ends_at(ran) > rewards[1] + 1.0
    assert ran.metric("rewards/reward_model/mean") == rewards


def test_a_reward_model_leaves_the_dropout_as_it_was(tune, base, reward_model):
    """Its head is drawn before it is read: the run must not notice, nor one that goes on."""
    asked = {"reward_funcs": None, "lora_dropout": 0.2, "max_steps": 3, "save_steps": 2}
    inputs = {"reward_model": reward_model, "reward_base": base}
    whole = tune(inputs=inputs, **asked)
    rest = tune(inputs=inputs, resume=whole.workdir / "checkpoints" / "step-2", **asked)
    assert rest.adapter_sha256 == whole.adapter_sha256


def question(messages: Any) -> Question:
    return Question([1], Unanswered(messages, {}, 1))


def test_an_answer_scores_as_stage_rm_saw_it(base, liked, reward_model):
    scorer = load_scorer(reward_model, base, dtype=torch.float32, device="cpu", rows=3)
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    items = encode(read_stage(liked, "rm"), chat, Cutting(), stage="rm").examples
    pairs = [item for item in items if isinstance(item, Pair)]
    expected = scores(scorer.model, collate(pairs, pad_id=2)).tolist()
    asked = [question([{"role": "user", "content": row["prompt"]}]) for row in LIKED]
    found = [
        score
        for side in ("chosen", "rejected")
        for (score,) in scorer.scores(
            asked, [Answered(row[side], 0, {}) for row in LIKED], lambda: None
        )
    ]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    chosen, rejected = found[: len(LIKED)], found[len(LIKED) :]
    assert all(good > bad for good, bad in zip(chosen, rejected, strict=True))


def test_a_whole_model_that_scores_is_read_as_transformers_writes_it(tmp_path, base, reward_model):
    adapter = load_scorer(reward_model, base, dtype=torch.float32, device="cpu", rows=8)
    whole = adapter.model.merge_and_unload()
    assert isinstance(whole, LlamaForSequenceClassification)
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "whole" / name).write_bytes((base / name).read_bytes())
    scorer = load_scorer(tmp_path / "whole", None, dtype=torch.float32, device="cpu", rows=8)
    again = load_scorer(reward_model, base, dtype=torch.float32, device="cpu", rows=8)
    asked = [question([{"role": "user", "content": "Who?"}])] * 2
    answers = [Answered("aaaa", 4, {}), Answered("zq", 2, {})]
    found, expected = (each.scores(asked, answers, lambda: None) for each in (scorer, again))
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]


@pytest.mark.parametrize(
    "tuning",
    [
        {"finetuning_type": "full", "learning_rate": 0.003},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 0.003},
        {"finetuning_type": "ia3"},
        {"use_dora": True},
    ],
    ids=str,
)
def test_what_learns_may_be_anything_that_can_answer(tune, tuning):
    ran = tune(max_steps=3, beta=0.1, save_steps=2, **tuning)
    assert ran.code == 0, ran.failure
    assert ran.metric("kl")[1] == pytest.approx(0.0, abs=1e-6)
    resume = ran.workdir / "checkpoints" / "step-2"
    rest = tune(max_steps=3, beta=0.1, save_steps=2, resume=resume, **tuning)
    assert rest.metric("loss")[3] == ran.metric("loss")[3]


@pytest.mark.parametrize("form", ["adapter", "whole"])
def test_llama_factorys_value_head_is_read(tmp_path, base, form):
    """Its files: weights or a plain adapter, and the head's own; the score is at the last token."""
    folder = tmp_path / "lf"
    if form == "whole":
        folder = a_tiny_base(folder)
    else:
        ran = run_here(
            tmp_path,
            finetune,
            inputs={"model": base, "dataset": a_dataset(tmp_path / "r.jsonl")},
            seed=1,
            arguments={"max_steps": 1, "learning_rate": 0.1},
        )
        folder = ran.workdir / "output"
    torch.manual_seed(5)
    weight, bias = torch.randn(1, 32), torch.randn(1)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    save_file(head, folder / VALUE_HEAD)
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if form == "adapter":
        model = PeftModel.from_pretrained(model, str(folder))
    model.eval()
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    text = chat.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (ids,) = chat.encode([text.removesuffix("\n")])
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    expected = float(hidden[0, -1] @ weight[0] + bias[0])
    own = base if form == "adapter" else None
    scorer = load_scorer(folder, own, dtype=torch.float32, device="cpu", rows=2)
    asked = [question([{"role": "user", "content": "a"}])]
    ((found,),) = scorer.scores(asked, [Answered("b", 1, {})], lambda: None)
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_scores_nothing_is_refused(tune, base, tmp_path):
    plain = tune(max_steps=1).workdir / "output"
    for folder, inputs, said in (
        (base, {}, "no head that gives one score"),
        (plain, {"reward_base": base}, "no reward model"),
    ):
        ran = tune(inputs={"reward_model": folder} | inputs, reward_funcs=None)
        assert (ran.code, said in ran.failure["evidence"]) == (64, True), ran.failure
        assert ran.failure["evidence"].startswith("reward_model: ")


def test_the_adapter_says_what_trained_it(tune):
    ran = tune(max_steps=1, temperature=0.7)
    applied = yaml.safe_load((ran.workdir / "output" / "training_args.yaml").read_text())
    assert (applied["temperature"], applied["num_generations"], applied["beta"]) == (0.7, 8, 0.0)
    about = json.loads((ran.workdir / "output" / "tuneyard.json").read_text())
    assert about["arguments"]["stage"] == "grpo"
    assert about["arguments"]["reward_funcs"][0]["name"] == "regex"
    tensors = load_file(ran.workdir / "output" / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
