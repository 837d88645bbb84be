"""Rows that examples share change nothing but speed; packs that were asked for change the run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attempts_by_hand import Ran, run_here
from support.families import WINDOW, a_family_base
from support.gradients import (
    GRADIENT,
    LOSS,
    a_model,
    by_engine,
    by_rows,
    distance,
    random_examples,
)
from support.tiny_models import ROWS, a_dataset, a_tiny_base
from transformers import LlamaForCausalLM

from tuneyard.runners.attention import attend_by, choose_way
from tuneyard.runners.base_model import load_weights, read_config
from tuneyard.runners.batches import collate
from tuneyard.runners.examples import IGNORED, Example, Labelled, Pack, Pair
from tuneyard.runners.finetune import finetune
from tuneyard.runners.losses import TokenLoss, token_losses
from tuneyard.runners.noise import EmbeddingNoise
from tuneyard.runners.packing import Packs, filled_groups, knapsacks, tokens_of
from tuneyard.runners.preferences import LabelLoss, PairLoss, RewardLoss
from tuneyard.runners.prepare import prepare
from tuneyard.runners.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LENGTHS = [21, 5, 3 * WINDOW, 12, 9, 17, 6, 30]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bases by family, made when asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = a_family_base(folder / family, family)
        return made[family]

    return base


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_shared_row_gives_the_losses_and_gradients_of_rows_of_their_own(bases, family):
    examples = random_examples(LENGTHS)
    expected = by_rows(a_model(bases(family)), examples)
    model = a_model(bases(family), "segments")
    for rows_per_group in (8, 2):
        found = by_engine(model, examples, shared=True, rows_per_group=rows_per_group)
        loss, gradient = distance(found, expected)
        assert loss <= LOSS
        assert gradient <= GRADIENT


def losses_of(model: Any, examples: list[Example], **changes: Any) -> torch.Tensor:
    batch = collate(examples, 2, shared=True)
    changed = {name: change(batch) for name, change in changes.items()}
    with torch.no_grad():
        return token_losses(model, dataclasses.replace(batch, **changed))


def test_examples_that_nothing_keeps_apart_fail_that_check(bases):
    """The break: positions that run on. transformers then takes the row for one example."""
    examples = random_examples(LENGTHS)
    model = a_model(bases("llama"))  # knows nothing of rows that are shared
    expected = losses_of(a_model(bases("llama"), "segments"), examples)
    apart = losses_of(model, examples)
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    run_on = losses_of(model, examples, places=lambda batch: torch.arange(batch.tokens)[None])
    assert float((run_on.sum() - expected.sum()).abs() / expected.sum()) > 1e-3

    def with_a_mask(**asked: Any) -> Any:
        """The break: a mask of ones, which hides that positions begin anew."""
        return model(attention_mask=torch.ones_like(asked["input_ids"]), **asked)

    seen = losses_of(with_a_mask, examples)
    assert float((seen.sum() - expected.sum()).abs() / expected.sum()) > 1e-3


def test_a_group_without_any_target_has_loss_0_and_gradients_0(bases):
    model = a_model(bases("llama"), "segments")
    empty = Example([5, 6, 7], [IGNORED] * 3)
    loss = TokenLoss().loss(model, collate([empty, empty], 2, shared=True)).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is None or float(grad.abs().max()) == 0.0 for grad in found)


def preferences() -> tuple[list[Pair], list[Labelled]]:
    rows = random_examples([12, 20, 9, 9, 31, 14])
    pairs = [Pair(*rows[i : i + 2]) for i in (0, 2, 4)]
    labelled = [Labelled(*rows[i : i + 2], wanted=i != 2) for i in (0, 2, 4)]
    return pairs, labelled


OBJECTIVES = {
    "dpo": PairLoss("sigmoid", 0.1, Reference(), ld_alpha=0.5, ftx=0.2),
    "orpo": PairLoss("orpo", 0.1, None),
    "kto": LabelLoss(0.1, Reference()),
    "rm": RewardLoss(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_preferences_are_learned_alike_in_a_shared_row(bases, name):
    objective, items = OBJECTIVES[name], preferences()[name == "kto"]
    found = []
    for way in ("padded", "segments"):
        model = a_model(bases("mistral"), way)
        if name == "rm":
            torch.manual_seed(0)
            bare = model.get_base_model()
            bare.score = torch.nn.Linear(bare.config.hidden_size, 1, bias=False)
        outcome = objective.loss(model, collate(items, 2, shared=way != "padded"))
        outcome.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        measures = {n: float(m.total) for n, m in outcome.measures.items()}
        found.append((float(outcome.loss.detach()), grads, measures))
    plain, shared = found
    assert shared[0] == pytest.approx(plain[0], rel=1e-5)
    assert shared[2] == pytest.approx(plain[2], rel=1e-4, abs=1e-5)
    for parameter, gradient in plain[1].items():
        error = (shared[1][parameter] - gradient).norm() / gradient.norm()
        assert error <= 1e-4, parameter  # sums of differences: looser than for tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return a_dataset(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def tune(tmp_path, base, dataset):
    """Fine-tune the tiny base on the eight rows, with these arguments."""

    def run(*, tokens: Path | None = None, model: Path = base, **arguments: Any) -> Ran:
        rows = {"tokens": tokens} if tokens else {"dataset": dataset}
        arguments = {"max_steps": 3, "per_device_train_batch_size": 4} | arguments
        return run_here(
            tmp_path,
            finetune,
            inputs={"model": model, **rows},
            seed=42,
            arguments={"learning_rate": 0.01, **arguments},
        )

    return run


def test_a_run_is_the_plain_recipes_however_its_rows_stand(tune):
    measured = {"val_size": 3, "eval_strategy": "steps", "eval_steps": 1}
    plain, shared = tune(attention="padded", **measured), tune(**measured)
    for name in ("loss", "eval_loss", "tokens"):
        assert shared.metric(name) == pytest.approx(plain.metric(name), rel=1e-5)
    assert shared.metric("grad_norm") == pytest.approx(plain.metric("grad_norm"), rel=1e-4)
    assert not shared.of_type("warning")


def test_gradient_checkpointing_keeps_examples_apart_too(tune):
    plain, saved = tune(attention="padded"), tune(gradient_checkpointing=True)
    assert saved.metric("loss") == pytest.approx(plain.metric("loss"), rel=1e-5)


def test_a_way_that_cannot_be_is_left_for_the_plain_one_with_a_reason(tune):
    (warning,) = tune(attention="varlen").of_type("warning")
    assert warning["code"] == "rows_padded"
    assert "needs a GPU" in warning["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "the family mamba"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic positions"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope positions"),
    ],
)
def test_a_model_that_was_not_shown_to_allow_it_gets_rows_of_their_own(bases, change, said):
    model = load_weights(
        bases("llama"), read_config(bases("llama")), dtype=torch.float32, device="cpu"
    )
    for name, value in change.items():
        setattr(model.config, name, value)
    choice = choose_way(model, device="cpu")
    assert choice.way == "padded"
    assert said in (choice.why or "")


def test_noise_is_sized_by_the_example_not_by_the_row(bases):
    model = a_model(bases("llama"))
    model.train()
    alpha, examples = 5.0, random_examples([4, 36])
    embedding = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    kept: list[torch.Tensor] = []
    EmbeddingNoise(model, alpha)
    embedding.register_forward_hook(lambda module, given, out: kept.append(out.detach()))
    for shared in (True, False):
        batch = collate(examples, 2, shared=shared)
        token_losses(model, batch)
        off = (kept.pop() - embedding.weight[batch.ids]).abs().amax(-1).flatten()
        first, second = off[:4], off[4:40] if shared else off[36:]
        for noise, length in ((first, 4), (second, 36)):
            bound = alpha / (length * width) ** 0.5
            assert 0.5 * bound < float(noise.max()) <= bound


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=24),
    st.integers(1, 8),
)
def test_filled_groups_hold_every_row_once_and_no_more_than_the_plain_ones(lengths, size):
    rows = [Example([7] * length, [7] * length) for length in lengths]
    plain = [rows[i : i + size] for i in range(0, len(rows), size)]
    groups = filled_groups(rows, size)
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    assert len(groups) <= len(plain)
    fullest = max(len(group) * max(map(tokens_of, group)) for group in plain)
    assert all(sum(map(tokens_of, group)) <= fullest for group in groups)


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 40))
def test_knapsacks_hold_every_row_that_fits_once(lengths, capacity):
    packs = knapsacks(lengths, capacity)
    held = sorted(i for pack in packs for i in pack)
    assert held == [i for i, length in enumerate(lengths) if length <= capacity]
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    # Greedy: what opens a later pack did not fit into any before.
    for number, pack in enumerate(packs[1:], start=1):
        longest = max(lengths[i] for i in pack)
        assert all(
            sum(lengths[i] for i in before) + longest > capacity
            or longest <= min(lengths[i] for i in before)
            for before in packs[:number]
        )


def test_packs_are_made_a_thousand_rows_at_a_time():
    rows = random_examples([4] * 1001)
    packs = Packs(rows, 10_000, apart=True)
    assert [len(pack.parts) for pack in packs] == [1000, 1]


def test_rows_of_a_pack_see_each_other_unless_it_is_neat(bases):
    rows = random_examples([10, 14])
    together = rows[0].ids + rows[1].ids
    places = [*range(10), *range(14)]
    plain = LlamaForCausalLM.from_pretrained(bases("llama"), attn_implementation="eager").eval()
    with torch.no_grad():
        logits = plain(
            input_ids=torch.tensor([together]),
            position_ids=torch.tensor([places]),
            attention_mask=torch.ones(1, 24, dtype=torch.long),
            use_cache=False,
        ).logits[0]
    labels = torch.tensor([*rows[0].labels[1:], IGNORED, *rows[1].labels[1:], IGNORED])
    seen = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    own = losses_of(plain, rows).sum()
    assert abs(float(seen - own)) > 0.01
    for way in ("padded", "segments"):
        model = load_weights(
            bases("llama"), read_config(bases("llama")), dtype=torch.float32, device="cpu"
        )
        attend_by(model, way)
        for apart, expected in ((False, seen), (True, own)):
            pack = Pack(tuple(rows), apart)
            # A second pack of another length: there is padding, or another sequence in the row.
            batch = collate([pack, Pack(tuple(rows[:1]), apart)], 2, shared=way != "padded")
            with torch.no_grad():
                found = token_losses(model, batch).sum() - losses_of(plain, rows[:1]).sum()
            assert float(found) == pytest.approx(float(expected), rel=1e-5), (way, apart)


def test_the_first_token_of_a_row_in_a_pack_is_nobodys_target():
    rows = random_examples([10, 14], kind="prompt")
    pack = Pack(tuple(rows), apart=False)
    assert pack.targets == 9 + 13
    for shared in (True, False):
        batch = collate([pack], 2, shared=shared)
        assert int((batch.targets != IGNORED).sum()) == pack.targets


def test_a_pack_counts_as_one_row(tune):
    epoch = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    rows, packs = tune(**epoch), tune(neat_packing=True, cutoff_len=100, **epoch)
    steps = len(packs.metric("loss"))
    assert len(rows.metric("loss")) == len(ROWS)
    assert 1 < steps < len(ROWS)
    assert packs.metric("tokens")[steps] == rows.metric("tokens")[len(ROWS)]


def test_a_neat_pack_of_all_rows_is_a_step_of_all_rows_and_another_pack_is_not(tune):
    once = {"max_steps": 1, "disable_shuffling": True}
    rows = tune(per_device_train_batch_size=len(ROWS), **once)
    neat = tune(neat_packing=True, **once)
    seen = tune(packing=True, **once)
    assert neat.metric("loss")[1] == pytest.approx(rows.metric("loss")[1], rel=1e-5)
    assert neat.metric("grad_norm")[1] == pytest.approx(rows.metric("grad_norm")[1], rel=1e-4)
    assert abs(seen.metric("loss")[1] - rows.metric("loss")[1]) > 1e-3


def test_packs_are_the_same_from_rows_and_from_prepared_tokens(tmp_path, tune, base, dataset):
    inputs = {"model": base, "dataset": dataset}
    packing = {"packing": True, "cutoff_len": 100}
    prepared = run_here(tmp_path, prepare, kind="prepare", inputs=inputs, arguments=packing)
    tokens = prepared.workdir / "output"
    assert tune(**packing).adapter_sha256 == tune(tokens=tokens, **packing).adapter_sha256
    other = tune(tokens=tokens, packing=True, cutoff_len=101)
    assert "another cutoff_len" in other.failure["evidence"]


def test_a_row_in_a_pack_is_cut_one_token_shorter_as_llamafactory_does(tmp_path, base):
    path = a_dataset(tmp_path / "long.jsonl", [{"instruction": "x", "output": "y" * 200}] * 2)
    inputs, tokens = {"model": base, "dataset": path}, []
    for packing in ({}, {"packing": True}, {"neat_packing": True}):
        ran = run_here(
            tmp_path,
            prepare,
            kind="prepare",
            inputs=inputs,
            arguments={"cutoff_len": 64, **packing},
        )
        about = json.loads((ran.workdir / "output" / "tokens.json").read_text())
        tokens.append(about["training_tokens"])
    assert tokens == [128, 126, 126]
