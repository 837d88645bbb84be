"""The model that answers are compared with: another one, or the trained one in an earlier state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tuneyard.runners.adapter import trained_parameters
from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import load_weights, read_config
from tuneyard.runners.batches import Batch
from tuneyard.runners.learned import load_adapter
from tuneyard.runners.losses import token_losses


@dataclass(frozen=True)
class Reference:
    """``frozen``, or the trained model with ``start`` in place of what learned, or its bare base.

    said: what manifests call it.
    """

    frozen: Any | None = None
    start: Mapping[str, torch.Tensor] | None = None
    said: str = "base"

    @torch.no_grad()
    def logps(self, model: Any, batch: Batch, *, temperature: float = 1.0) -> torch.Tensor:
        """log p of each target, [sequences, positions]; without dropout and noise."""
        if self.frozen is not None:
            return -token_losses(self.frozen, batch, temperature=temperature)
        training = model.training
        model.eval()
        with model.disable_adapter() if self.start is None else _put_in(model, self.start):
            found = -token_losses(model, batch, temperature=temperature)
        model.train(training)
        return found


@contextmanager
def _put_in(model: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other values in place of what learns, for a while."""
    learning = trained_parameters(model)
    now = {name: parameter.data for name, parameter in learning.items()}
    for name, parameter in learning.items():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in learning.items():
            parameter.data = now[name]


def _as_it_learns(frozen: Any, model: Any) -> None:
    """Give a copy of the base the formats that norms and embedding have where they learn.

    They decide about the format of what layers hand on. Matrices are rounded alike for products.
    """
    learning, embedding = trained_parameters(model), frozen.get_input_embeddings().weight
    for name, parameter in frozen.named_parameters():
        if name in learning and (parameter.ndim == 1 or parameter is embedding):
            parameter.data = parameter.data.to(learning[name].dtype)


def load_reference(
    asked: Asked, attempt: Attempt, model: Any, *, dtype: Any, quantisation: Any
) -> Reference:
    """What a run compares with; ``model`` has taken no step yet.

    A model whose own weights learn needs a second copy of its base. quantisation: of a model that
    was named.
    """
    arguments, named, ids = asked.arguments, attempt.spec.inputs, attempt.spec.input_ids
    device = attempt.device.torch_name
    other, over = "ref_model" in named, "ref_model_adapters" in named
    if other or over or not hasattr(model, "disable_adapter"):
        folder = attempt.input("ref_model") if other else asked.model
        frozen = load_weights(
            folder, read_config(folder), dtype=dtype, device=device, quantisation=quantisation
        )
        if not other:
            _as_it_learns(frozen, model)
        if over:
            frozen = load_adapter(frozen, attempt.input("ref_model_adapters"))
        names = [ids.get(n, n) for n in ("ref_model", "ref_model_adapters") if n in named]
        return Reference(frozen.requires_grad_(False).eval(), said=" + ".join(names) or "base")
    if asked.adapters and arguments.goes_on and arguments.reference == "start":
        start = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
        return Reference(start=start, said="adapter as it began")
    laid_in = asked.adapters if arguments.create_new_adapter else asked.adapters[:-1]
    return Reference(said="base with the adapters below" if laid_in else "base")
