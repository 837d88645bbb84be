"""Stages pt, rm, dpo and kto: exact at the start, right at the end. Tiny models, fp32, CPU."""

import json
import math
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import ANIMALS, LLAMA, a_dataset, a_tiny_base
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.base_model import load_tokenizer, load_weights, read_config
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import chat_of
from tuneyard.runners.examples import Cutting, Example, Item, Pair, encode
from tuneyard.runners.finetune import finetune
from tuneyard.runners.infer import infer
from tuneyard.runners.learned import restore_adapter
from tuneyard.runners.losses import RunningMean, TokenLoss
from tuneyard.runners.precision import Precision
from tuneyard.runners.preferences import LabelLoss, PairLoss, RewardLoss, scores
from tuneyard.runners.prepare import prepare
from tuneyard.runners.reference import Reference
from tuneyard.runners.rows import read_stage
from tuneyard.runners.tokens import RowWriter, TokenRows, digest_of
from tuneyard.specs.evaluating import MEASURED

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PAIRS = [
    {"instruction": f"What does a {a} say?", "chosen": f"{a[::-1]}!", "rejected": f"a {a} says no"}
    for a in ANIMALS
]
LABELLED = [
    {"instruction": row["instruction"], "output": row[side], "kto_tag": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
TEXTS = [{"text": f"The {a} sings " + "la " * (3 + i)} for i, a in enumerate(ANIMALS)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pt": TEXTS, "rm": PAIRS, "dpo": PAIRS, "kto": LABELLED,
}  # fmt: skip


INPUTS = ("tokens", "ref_model", "ref_model_adapters", "adapter", "adapter_2", "model")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tune(tmp_path: Path, base: Path):
    """Fine-tune the tiny base in a stage, on its rows."""

    def run(stage: str, *, resume: Path | None = None, rows: Any = None, **arguments: Any) -> Ran:
        dataset = a_dataset(tmp_path / f"{stage}.jsonl", rows or ROWS[stage])
        inputs = {"model": base, "dataset": dataset}
        inputs |= {k: arguments.pop(k) for k in INPUTS if k in arguments}
        return run_here(
            tmp_path,
            finetune,
            inputs=inputs,
            input_ids={"model": "tiny"},
            resume=resume and str(resume),
            arguments={"stage": stage, "lora_rank": 4, "max_steps": 3, "learning_rate": 0.01}
            | arguments,
        )

    return run


def items_of(base: Path, tmp_path: Path, stage: str, **cutting: Any) -> list[Item]:
    rows = read_stage(a_dataset(tmp_path / f"{stage}.jsonl", ROWS[stage]), stage)
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    return encode(rows, chat, Cutting(**cutting), stage=stage).examples


def a_model(base: Path, *, random: bool = True, stage: str = "dpo") -> Any:
    """The tiny base with an adapter; random: whose B is not 0."""
    weights = load_weights(
        base, read_config(base), dtype=torch.float32, device="cpu", scoring=stage == "rm"
    )
    arguments = FinetuneArguments(stage=stage, lora_rank=4)
    model = add_adapter(weights, arguments, seed=0, precision=Precision("float32"))
    torch.manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if random and ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def plain_logps(model: Any, example: Example) -> torch.Tensor:
    """log p of each target, as a textbook has it: one row, full logits."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
    labels = torch.tensor(example.labels[1:])
    kept = labels != -100
    return -cross_entropy(logits[kept], labels[kept], reduction="none")


# ---- the forms of rows ----


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "ask", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "ask"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "messages": [{"role": "user", "content": "ask"}],
            "chosen": {"role": "assistant", "content": "good"},
            "rejected": {"role": "assistant", "content": "bad"},
        },
        {
            "prompt": [{"role": "user", "content": "ask"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {
            side: [{"role": "user", "content": "ask"}, {"role": "assistant", "content": said}]
            for side, said in (("chosen", "good"), ("rejected", "bad"))
        },
    ],
)
def test_a_preference_reads_the_same_in_every_form(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = read_stage(a_dataset(tmp_path / "rows.jsonl", [row]), "dpo")
    asked = {"role": "user", "content": "ask"}
    assert found.chosen.messages == [asked, {"role": "assistant", "content": "good"}]
    assert found.rejected.messages == [asked, {"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "ask", "output": "said", "kto_tag": True},
        {"prompt": "ask", "completion": "said", "label": True},
        {
            "prompt": [{"role": "user", "content": "ask"}],
            "completion": [{"role": "assistant", "content": "said"}],
            "label": True,
        },
        {
            "messages": [
                {"role": "user", "content": "ask"},
                {"role": "assistant", "content": "said"},
            ],
            "label": True,
        },
        {
            "conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "said"}],
            "kto_tag": True,
        },
    ],
)
def test_a_labelled_answer_reads_the_same_in_every_form(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    (found,) = read_stage(a_dataset(tmp_path / "rows.jsonl", [row]), "kto")
    assert found.wanted is True
    assert [m["content"] for m in found.answered.messages] == ["ask", "said"]


@pytest.mark.parametrize(
    ("stage", "row", "said"),
    [
        ("dpo", {"instruction": "a", "output": "b"}, "needs chosen and rejected answers"),
        ("rm", {"text": "a"}, "needs chosen and rejected answers"),
        ("kto", {"instruction": "a", "output": "b"}, "needs answers with a label"),
        ("kto", {"instruction": "a", "output": "b", "kto_tag": "yes"}, "true or false"),
        ("pt", {"instruction": "a", "output": "b"}, "needs texts"),
        ("dpo", {"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "no column 'prompt'"),
        ("dpo", {"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen must be a text"),
        (
            "dpo",
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "chosen": "c",
                "rejected": "d",
            },
            "where the question should be",
        ),
    ],
)
def test_rows_of_another_stage_are_refused_with_their_line(tune, stage, row, said) -> None:
    ran = tune(stage, rows=[*ROWS[stage][:2], row])
    assert ran.code == 65
    assert "line 3" in json.dumps(ran.failure).lower() or ran.failure.get("line") == 3
    assert said in json.dumps(ran.failure)


# ---- tokens ----


def test_both_answers_of_a_pair_share_what_is_kept_of_the_question(base, tmp_path) -> None:
    for cutoff_len in (2048, 24):
        for pair in items_of(base, tmp_path, "dpo", cutoff_len=cutoff_len):
            assert isinstance(pair, Pair)
            asked = [sum(label == -100 for label in e.labels) for e in (pair.chosen, pair.rejected)]
            assert asked[0] == asked[1] > 0
            assert pair.chosen.ids[: asked[0]] == pair.rejected.ids[: asked[0]]
            assert max(len(pair.chosen.ids), len(pair.rejected.ids)) <= cutoff_len


def test_a_mismatched_answer_is_that_of_the_row_before(base, tmp_path) -> None:
    items = items_of(base, tmp_path, "kto")

    def said(example: Example) -> list[int]:
        return [label for label in example.labels if label != -100]

    for before, item in pairwise([items[-1], *items]):
        assert said(item.mismatched) == said(before.example)
    assert [item.wanted for item in items] == [True, False] * len(ANIMALS)


def test_texts_are_joined_and_cut_and_nothing_of_them_is_lost(base, tmp_path) -> None:
    tokenizer = load_tokenizer(base)
    each = items_of(base, tmp_path, "pt", blocks=False)
    assert [e.ids[-1] for e in each] == [tokenizer.eos_token_id] * len(TEXTS)
    assert [tokenizer.decode(e.ids[:-1]) for e in each] == [row["text"] for row in TEXTS]
    blocks = items_of(base, tmp_path, "pt", cutoff_len=32)
    assert [len(e.ids) for e in blocks[:-1]] == [32] * (len(blocks) - 1)
    assert [i for e in blocks for i in e.ids] == [i for e in each for i in e.ids]
    assert all(e.labels == e.ids for e in (*each, *blocks))


def test_a_last_token_that_is_left_alone_is_no_row_that_cutoff_len_cut(base, tmp_path) -> None:
    tokens = sum(len(e.ids) for e in items_of(base, tmp_path, "pt", blocks=False))
    width = next(n for n in range(8, tokens) if tokens % n == 1)
    rows = read_stage(tmp_path / "pt.jsonl", "pt")
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    encoded = encode(rows, chat, Cutting(cutoff_len=width), stage="pt")
    assert len(encoded.examples) == tokens // width
    assert encoded.skipped == 0


def test_a_text_begins_with_bos_where_the_tokenizer_adds_one(tmp_path) -> None:
    base = a_tiny_base(tmp_path / "llama", template=LLAMA)
    each = items_of(base, tmp_path, "pt", blocks=False)
    assert {item.ids[0] for item in each} == {0}
    assert all(0 not in item.ids[1:] for item in each)
    blocks = items_of(base, tmp_path, "pt", cutoff_len=16)
    assert [i for e in blocks for i in e.ids] == [i for e in each for i in e.ids]


@pytest.mark.parametrize("stage", ["pt", "dpo", "kto"])
def test_stored_items_are_those_that_were_made(base, tmp_path, stage) -> None:
    items = items_of(base, tmp_path, stage)
    writer = RowWriter()
    writer.add(items)
    writer.write(tmp_path / "tokens")
    stored = TokenRows(tmp_path / "tokens")
    assert list(stored) == items
    assert digest_of(stored) == digest_of(items)


@pytest.mark.parametrize("stage", ["pt", "rm", "dpo", "kto"])
def test_prepared_tokens_give_the_same_bits(tune, base, tmp_path, stage) -> None:
    here = tune(stage)
    inputs = {"model": base, "dataset": tmp_path / f"{stage}.jsonl"}
    prepared = run_here(
        tmp_path, prepare, kind="prepare", inputs=inputs, arguments={"stage": stage}
    )
    there = tune(stage, tokens=prepared.workdir / "output")
    assert there.adapter_sha256 == here.adapter_sha256


def test_a_stop_within_a_step_leaves_the_baseline_of_bco_as_it_was(tune, monkeypatch) -> None:
    told = {"pref_bco_weight": 1.0, "per_device_train_batch_size": 2}
    told |= {"gradient_accumulation_steps": 2}
    whole = tune("dpo", **told)
    groups, loss = iter(range(99)), PairLoss.loss

    def stopping(objective: PairLoss, model: Any, batch: Any) -> Any:
        if next(groups) == 2:  # the first of the second step
            signal.raise_signal(signal.SIGTERM)
        return loss(objective, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(PairLoss, "loss", stopping)
        stopped = tune("dpo", **told)
    assert stopped.code == 75
    resumed = tune("dpo", **told, resume=stopped.workdir / "checkpoints" / "step-1")
    assert resumed.metric("loss")[3] == whole.metric("loss")[3]
    assert resumed.adapter_sha256 == whole.adapter_sha256


# ---- losses against the formulas ----


def _expected(form: str, pair: Pair, model: Any) -> float:
    """The loss of a pair, by the papers' formulas in float64, one row at a time."""
    with torch.no_grad():
        now = [plain_logps(model, e).double() for e in (pair.chosen, pair.rejected)]
        with model.disable_adapter():
            then = [plain_logps(model, e).double() for e in (pair.chosen, pair.rejected)]
    sums, means = [float(x.sum()) for x in now], [float(x.mean()) for x in now]
    old, old_means = [float(x.sum()) for x in then], [float(x.mean()) for x in then]
    gained = (sums[0] - sums[1]) - (old[0] - old[1])

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    def odds(logp: float) -> float:
        return logp - math.log(1 - math.exp(logp))

    if form == "sigmoid":
        return -log_sigmoid(0.3 * gained)
    if form == "smoothed":
        return -0.8 * log_sigmoid(0.3 * gained) - 0.2 * log_sigmoid(-0.3 * gained)
    if form == "hinge":
        return max(0.0, 1 - 0.3 * gained)
    if form == "ipo":
        gained = (means[0] - means[1]) - (old_means[0] - old_means[1])
        return (gained - 1 / 0.6) ** 2
    if form == "simpo":
        return -log_sigmoid(0.3 * (means[0] - means[1]) - 0.5)
    if form == "orpo":
        return -means[0] - 0.3 * log_sigmoid(odds(means[0]) - odds(means[1]))
    if form == "ftx":
        return -log_sigmoid(0.3 * gained) - 0.7 * means[0]
    assert form == "ld"
    shared = min(len(x) for x in now)
    kept = [float(x[:shared].sum() + 0.25 * x[shared:].sum()) for x in now]
    return -log_sigmoid(0.3 * ((kept[0] - kept[1]) - (old[0] - old[1])))


FORMS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"form": "sigmoid", "label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "simpo": {"reference": None},
    "orpo": {"reference": None},
    "ftx": {"form": "sigmoid", "ftx": 0.7},
    "ld": {"form": "sigmoid", "ld_alpha": 0.25},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_pair_is_the_papers(base, tmp_path, form) -> None:
    pairs, model = items_of(base, tmp_path, "dpo"), a_model(base)
    options = {"form": form, "beta": 0.3, "reference": Reference()} | FORMS[form]
    objective = PairLoss(**options)
    outcome = objective.loss(model, collate(pairs, 2))
    expected = sum(_expected(form, pair, model) for pair in pairs)
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert sum(map(objective.units, pairs)) == len(pairs)


def logratio(model: Any, example: Example) -> float:
    """How much likelier an answer is than to the bare base, as a logarithm."""
    with torch.no_grad():
        now = float(plain_logps(model, example).double().sum())
        with model.disable_adapter():
            return now - float(plain_logps(model, example).double().sum())


def test_bco_compares_with_the_mean_of_all_rewards_so_far(base, tmp_path) -> None:
    pairs, model = items_of(base, tmp_path, "dpo"), a_model(base)
    reference = Reference()
    without = PairLoss("sigmoid", 0.3, reference)
    baseline = RunningMean(total=2.0, count=1)
    with_bco = PairLoss("sigmoid", 0.3, reference, bco=0.5, baseline=baseline)
    batch = collate(pairs, 2)
    plain, both = without.loss(model, batch), with_bco.loss(model, batch)
    rewards = {
        name: float(plain.measures[f"rewards/{name}"].total) / len(pairs)
        for name in ("chosen", "rejected")
    }
    seen = sum(rewards.values()) / 2
    assert baseline.count == 2
    assert baseline.total == pytest.approx(2.0 + seen, rel=1e-5)
    model.eval()
    with_bco.loss(model, batch)
    assert baseline.count == 2  # measuring does not move it
    mean, expected = baseline.total / baseline.count, 0.0
    for pair in pairs:
        good, bad = (0.3 * logratio(model, each) for each in (pair.chosen, pair.rejected))
        expected += 0.5 * (math.log1p(math.exp(mean - good)) + math.log1p(math.exp(bad - mean)))
    assert float((both.loss - plain.loss).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [16, 4])
def test_the_loss_of_a_labelled_answer_is_the_papers(base, tmp_path, size) -> None:
    items, model = items_of(base, tmp_path, "kto")[:size], a_model(base)
    objective = LabelLoss(0.3, Reference(), wanted_weight=2.0, unwanted_weight=0.5)
    outcome = objective.loss(model, collate(items, 2))
    drift = sum(logratio(model, item.mismatched) for item in items)
    divergence = max(0.0, drift / len(items))
    expected = 0.0
    for item in items:
        distance = 0.3 * (logratio(model, item.example) - divergence) * (1 if item.wanted else -1)
        expected += (2.0 if item.wanted else 0.5) * (1 - 1 / (1 + math.exp(-distance)))
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(outcome.measures["rewards/chosen"].over) == size // 2


@pytest.mark.parametrize("size", [16, 4, 3])
def test_what_ftx_adds_to_kto_is_what_llama_factory_adds(base, tmp_path, size) -> None:
    items, model = items_of(base, tmp_path, "kto")[:size], a_model(base)
    plain, more = (LabelLoss(0.1, Reference(), ftx=ftx) for ftx in (0.0, 0.3))
    batch = collate(items, 2)
    added = float((more.loss(model, batch).loss - plain.loss(model, batch).loss).detach()) / size
    wanted = [item.example for item in items if item.wanted]
    with torch.no_grad():
        means = [-float(plain_logps(model, each).mean()) for each in wanted]
    expected = 0.3 * sum(means) / len(wanted) * size / len(wanted)
    assert added == pytest.approx(expected, rel=1e-5)


def test_a_score_is_the_heads_at_the_last_token_even_where_that_is_padding_too(
    base, tmp_path
) -> None:
    pairs, model = items_of(base, tmp_path, "rm"), a_model(base, stage="rm")
    batch = collate(pairs, 2)  # 2 pads, and ends each answer's turn
    with torch.no_grad():
        found = scores(model, batch)
        for example, score in zip(
            [p.chosen for p in pairs] + [p.rejected for p in pairs], found, strict=True
        ):
            whole = model.get_base_model()
            hidden = whole.model(input_ids=torch.tensor([example.ids])).last_hidden_state
            assert float(whole.score(hidden[0, -1])) == pytest.approx(float(score), rel=1e-5)
    loss = RewardLoss().loss(model, batch).loss
    chosen, rejected = found.chunk(2)
    assert float(loss.detach()) == pytest.approx(
        float(-torch.nn.functional.logsigmoid(chosen - rejected).sum()), rel=1e-6
    )


@pytest.mark.parametrize("stage", ["pt", "rm", "dpo"])
def test_groups_of_a_step_add_up(base, tmp_path, stage) -> None:
    """Not of kto: there a group's own divergence counts."""
    items, model = items_of(base, tmp_path, stage, blocks=False), a_model(base, stage=stage)
    objectives = {
        "pt": TokenLoss(),
        "rm": RewardLoss(),
        "dpo": PairLoss("sigmoid", 0.3, Reference()),
    }
    objective = objectives[stage]

    def gradients(size: int) -> dict[str, torch.Tensor]:
        for start in range(0, len(items), size):
            objective.loss(model, collate(items[start : start + size], 2)).loss.backward()
        found = {
            name: p.grad.clone()
            for name, p in trained_parameters(model).items()
            if p.grad is not None
        }
        model.zero_grad()
        return found

    whole, parts = gradients(len(items)), gradients(2)
    assert whole
    for name, gradient in parts.items():
        if whole[name].norm() > 0:
            assert (gradient - whole[name]).norm() / whole[name].norm() <= 1e-5, name


# ---- runs ----

STARTS = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}


@pytest.mark.parametrize("loss", STARTS)
def test_dpo_begins_exactly_where_the_reference_stands(tune, loss) -> None:
    ran = tune("dpo", pref_loss=loss)
    assert ran.metric("loss")[1] == pytest.approx(STARTS[loss], abs=1e-5)
    assert ran.metric("rewards/margins")[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1,
         "freeze_extra_modules": "embed_tokens,norm"},
        {"use_dora": True},
        {"pure_bf16": True, "finetuning_type": "full"},
    ],
    ids=lambda way: "-".join(map(str, way.values())),
)  # fmt: skip
def test_a_start_in_bf16_is_as_exact_whatever_learns_in_fp32(tune, way) -> None:
    ran = tune("dpo", max_steps=1, **{"bf16": True} | way)
    assert ran.metric("loss")[1] == pytest.approx(math.log(2), abs=1e-6)
    assert ran.metric("rewards/margins")[1] == 0


def test_kto_begins_with_a_half_a_row(tune) -> None:
    assert tune("kto").metric("loss")[1] == pytest.approx(0.5, abs=1e-5)


def test_pt_begins_where_the_base_is(tune, base) -> None:
    ran = tune("pt", packing=False, max_steps=1, per_device_train_batch_size=8)
    model = LlamaForCausalLM.from_pretrained(base)
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    with torch.no_grad():
        losses = [
            plain_logps(model, Example(ids := [*chat.encode([row["text"]])[0], 2], ids))
            for row in TEXTS
        ]
    assert ran.metric("loss")[1] == pytest.approx(float(-torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("dpo", {"pref_loss": "sigmoid"}),
        ("dpo", {"pref_loss": "hinge"}),
        ("dpo", {"pref_loss": "ipo"}),
        ("dpo", {"pref_loss": "orpo"}),
        ("dpo", {"pref_loss": "simpo", "pref_beta": 2.0}),
        ("dpo", {"pref_loss": "sigmoid", "pref_bco_weight": 0.5, "pref_ftx": 0.1}),
        ("rm", {}),
    ],
)
def test_held_in_pairs_are_ranked_right_at_the_end(tune, stage, options) -> None:
    ran = tune(stage, max_steps=25, per_device_train_batch_size=8, lora_rank=8, **options)
    assert ran.code == 0, ran.failure
    assert ran.metric("rewards/accuracies")[25] >= 0.95
    assert ran.metric("rewards/margins")[25] > ran.metric("rewards/margins")[1]


def test_kto_tells_wanted_from_unwanted_at_the_end(tune) -> None:
    ran = tune("kto", max_steps=25, per_device_train_batch_size=16, lora_rank=8)
    assert ran.metric("rewards/chosen")[25] > 0.5
    assert ran.metric("rewards/rejected")[25] < -0.5


def test_pt_learns_its_texts(tune) -> None:
    options = {"max_steps": 40, "per_device_train_batch_size": 8, "lora_rank": 16}
    ran = tune("pt", packing=False, learning_rate=0.02, **options)
    assert ran.metric("loss")[40] < ran.metric("loss")[1] / 3
    about = json.loads((ran.workdir / "output" / "tuneyard.json").read_text())
    assert about["arguments"]["stage"] == "pt"


def test_a_base_without_a_template_learns_texts_but_no_answers(tune, tmp_path) -> None:
    mute = a_tiny_base(tmp_path / "mute", template=None)
    ran = tune("pt", model=mute)
    assert ran.code == 0, ran.failure
    assert json.loads((ran.workdir / "output" / "tuneyard.json").read_text())["template"] is None
    assert "no chat template" in json.dumps(tune("dpo", model=mute).failure)


def test_the_reference_stays_as_it_was(tune, base, tmp_path) -> None:
    ran = tune("dpo", max_steps=6, per_device_train_batch_size=8, lora_dropout=0.5)
    pairs, model = items_of(base, tmp_path, "dpo"), a_model(base, random=False)
    before = Reference().logps(model, collate(pairs, 2))
    restore_adapter(model, ran.workdir / "output")
    assert torch.equal(Reference().logps(model, collate(pairs, 2)), before)
    assert model.training


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_that_goes_on_is_compared_with_what_was_asked_for(tune, tmp_path, bits) -> None:
    more = {"quantization_bit": bits} if bits else {}
    first = tune("dpo", max_steps=8, per_device_train_batch_size=8, **more).workdir / "output"
    cases = {
        "adapter as it began": {"adapter": first},
        "base": {"adapter": first, "reference": "base"},
        "ref_model_adapters": {"adapter": first, "ref_model_adapters": first}
        | ({"ref_model_quantization_bit": bits} if bits else {}),
    }
    if not bits:  # a quantised base has nothing merged into it
        cases["base with the adapters below"] = {"adapter": first, "create_new_adapter": True}
    starts = {}
    for said, options in cases.items():
        ran = tune("dpo", max_steps=1, per_device_train_batch_size=8, **options, **more)
        assert ran.code == 0, ran.failure
        about = json.loads((ran.workdir / "output" / "tuneyard.json").read_text())
        assert about["reference"] == said
        starts[said] = ran.metric("loss")[1]
    assert starts.pop("base") < 0.6  # the adapter prefers already
    assert starts == pytest.approx(dict.fromkeys(starts, math.log(2)), abs=1e-4)


def test_a_reference_that_holds_the_adapters_below_is_called_so(tune, tmp_path) -> None:
    first = tune("dpo", max_steps=2).workdir / "output"
    second = tune("dpo", max_steps=2, adapter=first).workdir / "output"
    both = {"adapter": first, "adapter_2": second, "max_steps": 1, "reference": "base"}
    about = json.loads((tune("dpo", **both).workdir / "output" / "tuneyard.json").read_text())
    assert about["reference"] == "base with the adapters below"


def test_the_start_of_an_adapter_is_compared_with_after_a_resume_too(tune) -> None:
    first = tune("dpo", max_steps=4).workdir / "output"
    options = {"adapter": first, "max_steps": 4, "save_steps": 2}
    whole = tune("dpo", **options)
    resumed = tune("dpo", resume=whole.workdir / "checkpoints" / "step-2", **options)
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_another_reference_is_compared_with(tune, tmp_path) -> None:
    other = a_tiny_base(tmp_path / "other", initializer_range=0.05)
    own, compared = tune("dpo"), tune("dpo", ref_model=other)
    assert compared.metric("loss")[1] != pytest.approx(own.metric("loss")[1], abs=1e-3)


@pytest.mark.parametrize(
    ("stage", "options"),
    [("pt", {}), ("rm", {}), ("dpo", {"pref_bco_weight": 1.0}), ("kto", {})],
)
def test_a_resumed_stage_ends_in_the_same_bits(tune, stage, options) -> None:
    options |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    options |= {"lora_dropout": 0.1, "cutoff_len": 64}
    whole = tune(stage, **options)
    resumed = tune(stage, resume=whole.workdir / "checkpoints" / "step-2", **options)
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert sorted(resumed.metric("loss")) == [3, 4]


def test_a_reward_models_folder_holds_its_head(tune) -> None:
    ran = tune("rm")
    tensors = load_file(ran.workdir / "output" / "adapter_model.safetensors")
    assert [name for name in tensors if "score" in name]
    config = json.loads((ran.workdir / "output" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
def test_an_evaluation_measures_what_may_be_asked_for(tune, stage) -> None:
    ran = tune(stage, val_size=0.5, eval_strategy="steps", eval_steps=1, max_steps=1)
    names = {name for event in ran.of_type("metric") for name in event["values"]}
    assert {n.removeprefix("eval_") for n in names if n.startswith("eval_")} == MEASURED[stage]


def test_evaluating_measures_what_the_stage_looks_at(tune) -> None:
    ran = tune("dpo", val_size=2, eval_strategy="steps", eval_steps=1)
    assert sorted(ran.metric("eval_rewards/accuracies")) == [0, 1, 2, 3]
    assert ran.metric("eval_loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_tuned_reward_model_is_no_model_to_ask(tune, base, tmp_path) -> None:
    ran = tune("rm")
    asked = run_here(
        tmp_path,
        infer,
        kind="inference",
        inputs={"model": base, "adapter": ran.workdir / "output"},
        arguments={"prompts": ["Who?"]},
    )
    assert asked.code != 0
    assert "reward model" in json.dumps(asked.failure)
