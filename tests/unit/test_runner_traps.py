"""Traps of training that let the loss fall all the same; docs/training-maths.md names them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attempts_by_hand import Ran, run_here
from support.tiny_models import a_dataset, a_tiny_base
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM

from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.batches import collate
from tuneyard.runners.chat import DATE, Chat, chat_of
from tuneyard.runners.examples import IGNORED, Cutting, Example, Pair, encode
from tuneyard.runners.finetune import finetune
from tuneyard.runners.layouts import SEAM
from tuneyard.runners.noise import EmbeddingNoise
from tuneyard.runners.precision import Precision
from tuneyard.runners.reading import Reading, reading
from tuneyard.runners.reference import Reference
from tuneyard.runners.rows import read_stage
from tuneyard.runners.training import Trainer
from tuneyard.specs.exits import ExitCode

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return a_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tune(tmp_path, base, monkeypatch):
    """Fine-tune the tiny base for one step; ``before`` changes the trainer before it trains."""

    def run(before: Callable[[Trainer], None] = lambda trainer: None, **arguments: Any) -> Ran:
        train = Trainer.train

        def changed(trainer: Trainer) -> None:
            before(trainer)
            train(trainer)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "train", changed)
            said = {"max_steps": 1, "per_device_train_batch_size": 8, "precision": "fp32"}
            inputs = {"model": base, "dataset": a_dataset(tmp_path / "rows.jsonl")}
            ran = run_here(tmp_path, finetune, inputs=inputs, arguments=said | arguments)
        assert ran.code == ExitCode.DONE
        return ran

    return run


def gradients_of(tune: Any, **arguments: Any) -> torch.Tensor:
    """All gradients of the first step, as the optimizer sees them."""
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.extend(p.grad.flatten().clone() for p in parameters if p.grad is not None)

    def before(trainer: Trainer) -> None:
        (optimizer,) = trainer.running.mover.parts
        optimizer.register_step_pre_hook(look)

    tune(before, **arguments)
    return torch.cat(seen)


def test_clipping_shrinks_all_gradients_alike_to_the_limit(tune):
    free, clipped = gradients_of(tune, max_grad_norm=0), gradients_of(tune, max_grad_norm=0.01)
    assert float(free.norm()) > 0.01
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(clipped, free * (clipped.norm() / free.norm()), rtol=1e-4, atol=0)


def test_gradients_are_unscaled_before_they_are_clipped(tune):
    def scaled(trainer: Trainer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.running = replace(trainer.running, scaler=scaler)

    plain, with_scaler = tune(max_grad_norm=0.01), tune(scaled, max_grad_norm=0.01)
    norms = [ran.metric("grad_norm")[1] for ran in (plain, with_scaler)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_a_step_whose_rows_are_all_masked_has_loss_0_and_moves_nothing(tune):
    begins: dict[str, torch.Tensor] = {}

    def masked(trainer: Trainer) -> None:
        empty = Example([5, 6, 7], [IGNORED] * 3)
        trainer.data = replace(trainer.data, examples=[empty] * len(trainer.data.examples))
        begins.update({n: p.clone() for n, p in trained_parameters(trainer.running.model).items()})
        kept.append(trainer)

    kept: list[Trainer] = []
    assert tune(masked).metric("loss") == {1: 0.0}
    for name, parameter in trained_parameters(kept[0].running.model).items():
        assert torch.equal(parameter, begins[name])


def test_noise_has_the_size_of_a_rows_own_length(base):
    model = LlamaForCausalLM.from_pretrained(base)
    EmbeddingNoise(model, alpha=5.0)
    rows = [Example([5] * length, [5] * length) for length in (4, 64)]
    batch = collate(rows, pad_id=2)
    embed = model.get_input_embeddings()
    with torch.no_grad(), reading(Reading(batch.sizes, batch.spans)):
        added = embed.train()(batch.ids) - embed.eval()(batch.ids)
    for row, length in zip(added, (4, 64), strict=True):
        size = 5.0 / (length * 32) ** 0.5
        assert size * 0.9 < float(row[:length].abs().max()) <= size * 1.0001


def test_the_reference_is_the_base_without_adapter_noise_or_dropout(base):
    weights = LlamaForCausalLM.from_pretrained(base)
    batch = collate([Example([5, 6, 7, 8], [IGNORED, 6, 7, 8])] * 2, pad_id=2)
    with torch.no_grad():
        own = weights(input_ids=batch.ids).logits.log_softmax(-1)
    own = own[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
    arguments = FinetuneArguments(lora_dropout=0.3)
    model = add_adapter(weights, arguments, seed=0, precision=Precision("float32"))
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    EmbeddingNoise(model, alpha=5.0)
    found = Reference().logps(model.train(), batch)
    assert torch.allclose(found, own, atol=1e-5)
    assert model.training


def test_a_long_answer_shortens_the_question_of_both(tmp_path, base):
    row = {"instruction": "q" * 60, "chosen": "yes", "rejected": "n" * 60}
    path = a_dataset(tmp_path / "pairs.jsonl", [row])
    chat = chat_of(load_tokenizer(base), template=None, default_system=None)
    (pair,) = encode(read_stage(path, "dpo"), chat, Cutting(64), stage="dpo").examples
    assert isinstance(pair, Pair)
    asked = [e.labels.count(IGNORED) for e in (pair.chosen, pair.rejected)]
    assert 0 < asked[0] == asked[1] < 60
    assert len(pair.rejected.ids) == 64


def test_a_template_that_prints_the_day_is_given_one_that_does_not_pass(base):
    chat = Chat(load_tokenizer(base), "{{ date_string }} {{ strftime_now('%d %b %Y') }}")
    assert chat.render([{"role": "user", "content": "x"}]) == f"{DATE} {DATE}"


def test_no_token_spans_a_seam(base):
    tokenizer = load_tokenizer(base)
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer._tokenizer = merging
    chat = Chat(tokenizer, "", seamed="{{ '' }}")
    assert chat.encode(["ab", f"a{SEAM}b"]) == [[2], [0, 1]]
