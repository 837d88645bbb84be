"""NEFTune: noise on the embeddings while training. Source: Jain et al. 2023, arXiv:2310.05914."""

from typing import Any

import torch


class EmbeddingNoise:
    """Adds uniform noise of size alpha / sqrt(length x width), with each row's own length."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None  # [rows] of the next batch, without padding
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return embedded
        sizes = self.alpha / (self.lengths * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * sizes[:, None, None].to(embedded.dtype)
