"""What a fine-tune asks for, read and checked before anything slow is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.arguments import FinetuneArguments, arguments_of
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import read_config
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.optimizers import check_packages


@dataclass(frozen=True)
class Asked:
    """A fine-tune's arguments and its base; base_id is what manifests call the base."""

    arguments: FinetuneArguments
    seed: int
    model: Path
    config: Mapping[str, Any]
    base_id: str


def read_asked(attempt: Attempt) -> Asked:
    """Read arguments and the base's configuration. Raises: BadSpec, InputGone."""
    arguments = arguments_of(attempt, FinetuneArguments)
    if arguments.val_size and "eval_dataset" in attempt.spec.inputs:
        raise BadSpec("val_size and eval_dataset exclude each other.", field="val_size")
    if arguments.mask_history and arguments.train_on_prompt:
        raise BadSpec("mask_history and train_on_prompt exclude each other.", field="mask_history")
    check_packages(arguments)
    model = attempt.input("model")
    config = read_config(model)
    seed = attempt.spec.seed if arguments.seed is None else arguments.seed
    base_id = attempt.spec.input_ids.get("model") or model.name
    return Asked(arguments, seed, model, config, base_id)
