"""adalora's two habits beside the loss: it keeps its factors orthogonal, and it cuts ranks.

peft adds the first to a loss that transformers computed, which ours is not; so it is done here,
once a step. Source: Zhang et al. 2023, arXiv:2303.10512; peft 0.21, tuners/adalora.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What the allocator remembers of each tensor: how much it matters, on average, and how surely."""


class RankAllocation:
    """The ranks of a run; ``state`` is all that a resumed one needs."""

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = model.peft_config["default"]
        self.factors = [
            (p, ".lora_A." in name)
            for name, p in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]

    def add_penalty(self) -> None:
        """Add the gradient of the distance from orthogonality, weighted, to that of the loss."""
        with torch.enable_grad():
            distances = [
                torch.linalg.matrix_norm(
                    _gram(p, rows=rows) - torch.eye(_rank(p, rows), device=p.device)
                )
                for p, rows in self.factors
            ]
            penalty = self.config.orth_reg_weight * torch.stack(distances).mean()
            penalty.backward()

    def after_step(self, step: int, *, overflowed: bool = False) -> None:
        """Look at the gradients of a step, and cut ranks when it is time. step: from 1 on.

        overflowed: by fp16's scaling; such gradients say nothing of what matters.
        """
        if step < self.config.total_step - self.config.tfinal:
            looks = not overflowed
        else:  # no gradients are looked at any more: ranks are cut by what is known
            looks = bool(self.tuner.rankallocator.exp_avg_ipt or self.config.rank_pattern)
        if looks:
            self.tuner.update_and_allocate(step)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors, and texts beside them, of a checkpoint."""
        allocator = self.tuner.rankallocator
        tensors = {
            f"{part}:{name}": value.detach().cpu().contiguous()
            for part in STATE
            for name, value in getattr(allocator, part).items()
        }
        return tensors, {"rank_pattern": json.dumps(self.config.rank_pattern)}

    def restore(self, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
        """Be where a checkpoint was."""
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        device = self.factors[0][0].device
        for key, value in tensors.items():
            part, _, name = key.partition(":")
            getattr(allocator, part)[name] = value.to(device)
        self.config.rank_pattern = json.loads(texts["rank_pattern"])


def allocation_of(model: Any) -> RankAllocation | None:
    """The ranks of a model whose adapter has some to give away."""
    return (
        RankAllocation(model)
        if hasattr(getattr(model, "base_model", None), "rankallocator")
        else None
    )


def _gram(factor: torch.Tensor, *, rows: bool) -> torch.Tensor:
    return factor @ factor.T if rows else factor.T @ factor


def _rank(factor: torch.Tensor, rows: bool) -> int:
    return factor.shape[0 if rows else 1]
