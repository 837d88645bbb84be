"""Weights of the base itself that learn: all of them, or those of some layers and modules.

Source of what freeze's names mean: LLaMA-Factory 0.9.5, model/adapter.py.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.failures import BadSpec
from tuneyard.specs.fields import words_in


def choose_whole(base: Any, arguments: FinetuneArguments) -> None:
    """Let all of the base learn, or what freeze asks for. Raises: BadSpec."""
    if arguments.finetuning_type == "full":
        base.requires_grad_(True)
        return
    wanted = learning_names(base, arguments)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in wanted)


def learning_names(base: Any, arguments: FinetuneArguments) -> set[str]:
    """Names of the base's parameters that freeze lets learn. Raises: BadSpec."""
    names = [name for name, _ in base.named_parameters()]
    parts, outer = words_in(arguments.freeze_trainable_modules), set(_outer(names))
    known = {match[2] for name in names if (match := _LAYER.search(name))}
    layers = _layers(base, arguments)
    extra = words_in(arguments.freeze_extra_modules)
    _check("freeze_trainable_modules", parts, known | {"all"})
    _check("freeze_extra_modules", extra, outer)
    found = set()
    for name in names:
        match = _LAYER.search(name)
        if match is None:
            if set(name.split(".")[:-1]) & set(extra):
                found.add(name)
        elif int(match[1]) in layers and ("all" in parts or match[2] in parts):
            found.add(name)
    return found


_LAYER = re.compile(r"\.(\d+)\.(\w+)")
"""The number of a layer, and the part of it that a parameter belongs to."""


def _layers(base: Any, arguments: FinetuneArguments) -> Iterable[int]:
    count, asked = layer_count(base), arguments.freeze_trainable_layers
    if arguments.use_llama_pro:
        return expanded_layers(base, asked)
    return range(max(0, count - asked), count) if asked >= 0 else range(min(-asked, count))


def expanded_layers(base: Any, asked: int) -> list[int]:
    """The last layer of each of so many groups of equal size. Raises: BadSpec."""
    count = layer_count(base)
    if count % asked:
        raise BadSpec(
            f"use_llama_pro: {count} layers are no multiple of {asked}.",
            field="freeze_trainable_layers",
            hint=f"one of {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}",
        )
    stride = count // asked
    return list(range(stride - 1, count, stride))


def layer_count(base: Any) -> int:
    """How many layers a base has. Raises: BadSpec for one that does not say."""
    config = base.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    if not count:
        message = "The base does not say how many layers it has."
        raise BadSpec(message, field="finetuning_type", hint="use full or lora")
    return int(count)


def _outer(names: Sequence[str]) -> list[str]:
    """Modules outside the layers."""
    return [name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name)]


def _check(field: str, asked: Sequence[str], known: set[str]) -> None:
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            choices = f"it has {', '.join(sorted(known - {'all'}))}"
            hint = f"nearest is {near[0]}" if near else choices
            raise BadSpec(f"There is no {name!r} to learn.", field=field, hint=hint)
