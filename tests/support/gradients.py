"""Losses and gradients of the plain recipe, and of the engine's groups, over one model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tuneyard.runners.adapter import add_adapter, trained_parameters
from tuneyard.runners.arguments import FinetuneArguments, Way
from tuneyard.runners.attention import attend_by, choose_way
from tuneyard.runners.base_model import load_weights, read_config
from tuneyard.runners.batches import collate
from tuneyard.runners.examples import Example, Item
from tuneyard.runners.losses import TokenLoss
from tuneyard.runners.packing import filled_groups
from tuneyard.runners.precision import Precision

LOSS, GRADIENT = 1e-6, 1e-5
"""How far a loss, and the gradient of a tensor, may be from the plain recipe, relative (fp32)."""


def a_model(base: Path, way: Way = "padded", *, device: str = "cpu", **arguments: Any) -> Any:
    """A base with an adapter of random values, the same for the same base and arguments."""
    asked = FinetuneArguments(**arguments)
    weights = load_weights(base, read_config(base), dtype=torch.float32, device=device)
    model = add_adapter(weights, asked, seed=0, precision=Precision("float32"))
    torch.manual_seed(1)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    choice = choose_way(model, device=device, wanted=way)
    assert choice.way == way, choice.why
    attend_by(model, way)
    return model


Result = tuple[float, Mapping[str, torch.Tensor]]


def by_rows(model: Any, examples: Sequence[Example]) -> Result:
    """One row after the other, by the loss that transformers computes of labels itself."""
    units, total = sum(each.targets for each in examples), 0.0
    for each in examples:
        ids, labels = torch.tensor([each.ids]), torch.tensor([each.labels])
        mean = model(input_ids=ids, labels=labels, use_cache=False).loss
        share = mean * each.targets / units
        share.backward()
        total += float(share.detach())
    return total, _gradients(model)


def by_engine(
    model: Any, items: Sequence[Item], *, shared: bool, rows_per_group: int, device: str = "cpu"
) -> Result:
    """The step as runners/training.py takes it."""
    objective, total = TokenLoss(), 0.0
    units = sum(map(objective.units, items))
    plain = [items[i : i + rows_per_group] for i in range(0, len(items), rows_per_group)]
    for group in filled_groups(items, rows_per_group) if shared else plain:
        loss = objective.loss(model, collate(group, 2, shared=shared).to(device)).loss / units
        loss.backward()
        total += float(loss.detach())
    return total, _gradients(model)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trained_parameters(model).items()
    }
    model.zero_grad()
    return found


def distance(found: Result, wanted: Result) -> tuple[float, float]:
    """How far apart, relative to what is wanted: the loss, and the gradient furthest off."""
    gradients = {
        name: float((found[1][name] - gradient).norm() / gradient.norm())
        for name, gradient in wanted[1].items()
        if float(gradient.norm())
    }
    assert gradients
    return abs(found[0] - wanted[0]) / wanted[0], max(gradients.values())


def random_examples(
    lengths: Sequence[int], *, vocabulary: int = 259, kind: str = "answers"
) -> list[Example]:
    """Rows of random tokens. kind: the second half is learned (answers), or all (prompt, text)."""
    stream = torch.Generator().manual_seed(3)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=stream).tolist()
        before = 0 if kind != "answers" else length // 2
        examples.append(Example(ids, [-100] * before + ids[before:]))
    return examples
