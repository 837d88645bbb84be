"""Experts of a mixture: transformers holds those of a layer in one tensor; LoRA leaves it alone."""

from typing import Any


def experts_of(model: Any) -> dict[str, bool]:
    """Last names of the tensors that hold experts -> whether they learn."""
    return {
        name.rpartition(".")[2]: parameter.requires_grad
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name
    }
