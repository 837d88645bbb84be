"""Learning rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import difflib
import math
from collections.abc import Callable, Mapping

from tuneyard.runners.failures import BadSpec

Decay = Callable[[int, int, int, Mapping[str, float]], float]
"""(step, warm-up steps, all steps, options) -> factor of the learning rate after the warm-up."""

Schedule = Callable[[int], float]


def schedule(
    name: str, *, warmup: int, total: int, learning_rate: float, options: Mapping[str, float]
) -> Schedule:
    """The learning rate of step 0, 1, … ``total`` - 1. Raises: BadSpec for an unknown name.

    Source: transformers 5.23, optimization.py (the same values, which a test compares).
    """
    if name not in DECAYS:
        near = difflib.get_close_matches(name, DECAYS, n=1)
        raise BadSpec(
            f"There is no schedule {name!r}.",
            field="lr_scheduler_type",
            hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(DECAYS)}",
        )
    decay = DECAYS[name]
    options = {"learning_rate": learning_rate, **options}

    def at(step: int) -> float:
        if name != "constant" and step < warmup:
            return learning_rate * step / max(1, warmup)
        return learning_rate * decay(step, warmup, total, options)

    return at


def warmup_steps(total: int, *, steps: float, ratio: float) -> int:
    """How many steps the warm-up takes: ``steps``, which below 1 is a share, else ``ratio``."""
    if steps >= 1:
        return int(steps)
    return math.ceil(total * (steps or ratio))


def _done(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _linear(step: int, warmup: int, total: int, _: Mapping[str, float]) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _constant(_step: int, _warmup: int, _total: int, _: Mapping[str, float]) -> float:
    return 1.0


def _cosine(step: int, warmup: int, total: int, options: Mapping[str, float]) -> float:
    cycles = options.get("num_cycles", 0.5)
    angle = math.pi * cycles * 2.0 * _done(step, warmup, total)
    return max(0.0, 0.5 * (1.0 + math.cos(angle)))


def _cosine_with_min_lr(step: int, warmup: int, total: int, options: Mapping[str, float]) -> float:
    least = options.get("min_lr_rate", options.get("min_lr", 0.0) / options["learning_rate"])
    cycles = options.get("num_cycles", 0.5)
    angle = math.pi * cycles * 2.0 * _done(step, warmup, total)
    return max(0.0, 0.5 * (1.0 + math.cos(angle)) * (1 - least) + least)


def _restarts(step: int, warmup: int, total: int, options: Mapping[str, float]) -> float:
    done = _done(step, warmup, total)
    if done >= 1.0:
        return 0.0
    angle = math.pi * ((options.get("num_cycles", 1) * done) % 1.0)
    return max(0.0, 0.5 * (1.0 + math.cos(angle)))


def _polynomial(step: int, warmup: int, total: int, options: Mapping[str, float]) -> float:
    end, start = options.get("lr_end", 1e-7), options["learning_rate"]
    if step > total:
        return end / start
    left = 1 - _done(step, warmup, total)
    return ((start - end) * math.pow(left, options.get("power", 1.0)) + end) / start


def _inverse_sqrt(step: int, warmup: int, _total: int, options: Mapping[str, float]) -> float:
    timescale = options.get("timescale") or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


DECAYS: Mapping[str, Decay] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
