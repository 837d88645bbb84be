"""NEFTune: noise on the embeddings while training. Source: Jain et al. 2023, arXiv:2310.05914."""

from typing import Any

import torch

from tuneyard.runners.reading import now


class EmbeddingNoise:
    """Adds uniform noise of size alpha / sqrt(length x width), with each example's own length."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        read = now()
        if not module.training or read is None:
            return embedded
        sizes = self.alpha / (read.spans * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * sizes[:, :, None].to(embedded.dtype)
