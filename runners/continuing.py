"""Going on from adapters: all but the last become part of the base, the last one learns on.

With create_new_adapter all of them do, and a fresh one learns. What is published holds them all as
one adapter, so that it stands over the base that everybody knows.
Source of the order: LLaMA-Factory 0.9.5, model/adapter.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tuneyard.runners.adapter import add_adapter, widen
from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.learned import load_adapter
from tuneyard.runners.origin import WEIGHTS_FILE, read_adapter_config
from tuneyard.runners.precision import Precision
from tuneyard.runners.summing import Summand, check_summable


def go_on(
    base: Any,
    adapters: Sequence[Path],
    arguments: FinetuneArguments,
    *,
    seed: int,
    precision: Precision,
) -> Any:
    """A base with adapters laid in, and what learns over it. Raises: BadData, BadSpec."""
    fresh = arguments.create_new_adapter
    below = list(adapters) if fresh else list(adapters[:-1])
    summands = [_read(adapter) for adapter in below]
    for adapter in below:
        base = load_adapter(base, adapter).merge_and_unload()
    if fresh:
        model = add_adapter(base, arguments, seed=seed, precision=precision)
    else:
        model = load_adapter(base, adapters[-1], learns=True)
        widen(model, precision)
    model.summands = [*summands, *getattr(model, "summands", ())]
    return model


def _read(adapter: Path) -> Summand:
    config, tensors = read_adapter_config(adapter), load_file(adapter / WEIGHTS_FILE)
    check_summable(config, tensors)
    return Summand(1.0, config, tensors)
