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
from tuneyard.specs.clashes import clashes_of
from tuneyard.specs.fields import WHAT


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


def read_asked(attempt: Attempt) -> Asked:
    """Read arguments and the base's configuration. Raises: BadSpec, InputGone."""
    arguments = arguments_of(attempt, FinetuneArguments)
    named = list(adapter_names(attempt.spec.inputs))
    arguments = arguments.model_copy(update=_references(attempt, named))
    for clash in clashes_of(arguments):
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


def _references(attempt: Attempt, adapters: Sequence[str]) -> Mapping[str, Any]:
    """Fields of a submission that name things -> what those are called that are there."""
    inputs, ids = attempt.spec.inputs, attempt.spec.input_ids
    found: dict[str, Any] = {name: ids.get(name) or name for name in WHAT.keys() & inputs.keys()}
    if "tokens" in inputs and _holds_rows_out(attempt.input("tokens")):
        found["eval_dataset"] = "tokens"
    if adapters:
        found["adapter"] = [ids.get(name) or name for name in adapters]
    return found


def _holds_rows_out(tokens: Path) -> bool:
    from tuneyard.runners.tokens import HELD_OUT, split_file  # numpy, which reading them takes

    return split_file(tokens, HELD_OUT).exists()


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
