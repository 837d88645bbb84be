"""What a fine-tune asks for, read and checked before anything slow is imported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.arguments import FinetuneArguments, arguments_of
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import read_config
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.origin import read_adapter_config
from tuneyard.runners.packages import check_packages
from tuneyard.runners.similarity import check_packages as check_scoring
from tuneyard.specs.optimizers import optimizer_clashes
from tuneyard.specs.predicting import predicting_clashes
from tuneyard.specs.tuning import tuning_clashes


@dataclass(frozen=True)
class Asked:
    """A fine-tune's arguments, its base, and adapters over that to go on from.

    base_id is what manifests call the base.
    """

    arguments: FinetuneArguments
    seed: int
    model: Path
    config: Mapping[str, Any]
    base_id: str
    adapters: Sequence[Path] = ()  # to go on from, in their order


def has_held_out(attempt: Attempt, arguments: FinetuneArguments) -> bool:
    """Whether there are rows to measure."""
    return bool(arguments.val_size) or "eval_dataset" in attempt.spec.inputs


def read_asked(attempt: Attempt) -> Asked:
    """Read arguments and the base's configuration. Raises: BadSpec, InputGone."""
    arguments = arguments_of(attempt, FinetuneArguments)
    if arguments.val_size and "eval_dataset" in attempt.spec.inputs:
        raise BadSpec("val_size and eval_dataset exclude each other.", field="val_size")
    if arguments.mask_history and arguments.train_on_prompt:
        raise BadSpec("mask_history and train_on_prompt exclude each other.", field="mask_history")
    named = list(adapter_names(attempt.spec.inputs))
    if named:
        ids = [attempt.spec.input_ids.get(name) or name for name in named]
        arguments = arguments.model_copy(update={"adapter": ids})
    for clash in [
        *tuning_clashes(arguments),
        *optimizer_clashes(arguments),
        *predicting_clashes(
            arguments, stage=arguments.stage, held_out=has_held_out(attempt, arguments)
        ),
    ]:
        raise BadSpec(clash.message, field=clash.field, hint=clash.hint)
    check_packages(arguments)
    if arguments.generates:
        check_scoring()
    model = attempt.input("model")
    config = read_config(model)
    seed = attempt.spec.seed if arguments.seed is None else arguments.seed
    base_id = attempt.spec.input_ids.get("model") or model.name
    adapters = [attempt.input(name) for name in named]
    for adapter in adapters:
        read_adapter_config(adapter)
    return Asked(arguments, seed, model, config, base_id, adapters)


def adapter_names(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Which inputs are adapters, in their order: adapter, adapter_2, adapter_3, …

    >>> list(adapter_names({"adapter_2": "b", "model": "m", "adapter": "a"}))
    ['adapter', 'adapter_2']
    """
    number, name = 1, "adapter"
    while name in inputs:
        yield name
        number += 1
        name = f"adapter_{number}"
