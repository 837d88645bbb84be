"""Merging by peft, with the whole model in memory: for what is more than a sum of plain factors."""

import logging
from pathlib import Path
from typing import Any

import torch

from tuneyard.runners.base_model import load_weights
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.learned import load_adapter
from tuneyard.runners.shards import save_weights

log = logging.getLogger(__name__)


def merge_whole(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    config: Any,
    dtypes: tuple[str, str],
    most_bytes: float,
) -> bool:
    """Write the merged weights alone; whether the model's two ends are two tensors now.

    dtypes: the base's and the result's; between two the sum is made in fp32.
    Raises: BadSpec, BadData.
    """
    own, dtype = dtypes
    loaded = "float32" if own != dtype else dtype
    model = load_weights(base, config, dtype=getattr(torch, loaded), device="cpu")
    tied = bool(model.config.tie_word_embeddings)
    merged = _merged(model, adapter).to(getattr(torch, dtype))
    save_weights(merged, folder, most_bytes=most_bytes)
    return tied and not merged.config.tie_word_embeddings


def _merged(model: Any, adapter: Path) -> Any:
    tuned = load_adapter(model, adapter)
    _refuse_tied(tuned)
    if not hasattr(tuned, "merge_and_unload"):
        kind = tuned.peft_config["default"].peft_type
        hint = "ask it as an adapter over its base"
        raise BadSpec(f"An adapter of type {kind} cannot be merged.", field="adapter", hint=hint)
    log.info("merging in memory")
    return tuned.merge_and_unload()


def _refuse_tied(tuned: Any) -> None:
    """A sum onto one end of a tied model would change the other as well. Raises: BadSpec."""
    model = tuned.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [getattr(end, "base_layer", end) for end in ends if end is not None]
    tuned_end = any(hasattr(end, "base_layer") for end in ends)
    if tuned_end and len(weights) == 2 and weights[0].weight is weights[1].weight:
        message = "The base's two ends are one tensor, and the adapter changes one of them only."
        hint = "tune it again without embed_tokens and lm_head"
        raise BadSpec(message, field="adapter", hint=hint)
