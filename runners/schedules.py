"""Learning rate schedules: most are pure functions of the step, with nothing to save.

Two go by what evaluations measure (reduce_lr_on_plateau, greedy) and have a state.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tuneyard.runners.failures import BadSpec

Options = Mapping[str, Any]
Decay = Callable[[int, int, int, Options], float]
"""(step, warm-up steps, all steps, options) -> factor of the learning rate after the warm-up."""

State = dict[str, Any]


class Schedule(Protocol):
    """The learning rate of a run."""

    def at(self, step: int) -> float:
        """The rate with which step ``step`` (0, 1, …) moves."""

    def measured(self, metric: float) -> None:
        """Hear what an evaluation found."""

    def state(self) -> State:
        """What goes into a checkpoint, as JSON."""

    def restore(self, state: State) -> None:
        """Go on from there."""


class Planned:
    """A schedule that the step alone decides."""

    def __init__(self, at: Callable[[int], float]) -> None:
        self.at = at

    def measured(self, metric: float) -> None:
        """Nothing follows from it."""

    def state(self) -> State:
        """None is needed."""
        return {}

    def restore(self, state: State) -> None:
        """Nothing to do."""


class Measured:
    """torch's ReduceLROnPlateau or transformers' GreedyLR, over an optimizer that moves nothing."""

    def __init__(self, name: str, learning_rate: float, options: Options) -> None:
        import torch
        from transformers import get_scheduler

        self._name = name
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        self._scheduler = get_scheduler(
            name, self._optimizer, scheduler_specific_kwargs=dict(options)
        )

    def at(self, step: int) -> float:
        """The rate that the evaluations so far have left."""
        return float(self._optimizer.param_groups[0]["lr"])

    def measured(self, metric: float) -> None:
        """Lower the rate when evaluations have not become better for a while."""
        self._scheduler.step(metric)

    def state(self) -> State:
        """Counters, the best metric and the rate: numbers and words."""
        return {"name": self._name, "lr": self.at(0), "scheduler": self._scheduler.state_dict()}

    def restore(self, state: State) -> None:
        """Go on from there, with the options of now, unless it was another schedule."""
        if state["name"] != self._name:
            return
        begun = self._scheduler.state_dict()
        kept = {name: state["scheduler"][name] for name in begun if name in _COUNTED}
        self._scheduler.load_state_dict(begun | kept)
        self._optimizer.param_groups[0]["lr"] = state["lr"]


_COUNTED = frozenset(
    """
    best num_bad_epochs num_good_epochs cooldown_counter warmup_counter last_epoch _last_lr
    _init_lrs reset_start _streaming_avg
    """.split()  # noqa: SIM905 - reads best as text
)
"""What those schedulers change as they go; the rest of their state is options."""

BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def schedule(
    name: str, *, warmup: int, total: int, learning_rate: float, options: Options
) -> Schedule:
    """The learning rate of step 0, 1, … ``total`` - 1. Raises: BadSpec for an unknown name.

    Source: transformers 5.23, optimization.py (the same values, which a test compares).
    """
    if name in BY_EVALUATION:
        return Measured(name, learning_rate, options)
    if name not in DECAYS:
        near = difflib.get_close_matches(name, DECAYS, n=1)
        raise BadSpec(
            f"There is no schedule {name!r}.",
            field="lr_scheduler_type",
            hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(DECAYS)}",
        )
    decay, warm = DECAYS[name], WARM_UPS.get(name, _warm)
    options = {"learning_rate": learning_rate, **options}

    def at(step: int) -> float:
        if name != "constant" and step < warmup:
            return learning_rate * warm(step, warmup, total, options)
        return learning_rate * decay(step, warmup, total, options)

    return Planned(at)


def warmup_steps(total: int, *, steps: float, ratio: float) -> int:
    """How many steps the warm-up takes: ``steps``, which below 1 is a share, else ``ratio``."""
    if steps >= 1:
        return int(steps)
    return math.ceil(total * (steps or ratio))


def _warm(step: int, warmup: int, _total: int, _: Options) -> float:
    return step / max(1, warmup)


def _done(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _linear(step: int, warmup: int, total: int, _: Options) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _constant(_step: int, _warmup: int, _total: int, _: Options) -> float:
    return 1.0


def _cosine(step: int, warmup: int, total: int, options: Options) -> float:
    cycles = options.get("num_cycles", 0.5)
    angle = math.pi * cycles * 2.0 * _done(step, warmup, total)
    return max(0.0, 0.5 * (1.0 + math.cos(angle)))


def _least(options: Options) -> float:
    """The least rate as a share of the peak."""
    share = options.get("min_lr_rate")
    return float(options.get("min_lr", 0.0) / options["learning_rate"] if share is None else share)


def _cosine_with_min_lr(step: int, warmup: int, total: int, options: Options) -> float:
    least, cycles = _least(options), options.get("num_cycles", 0.5)
    angle = math.pi * cycles * 2.0 * _done(step, warmup, total)
    return float(max(0.0, 0.5 * (1.0 + math.cos(angle)) * (1 - least) + least))


def _cosine_from_one(step: int, warmup: int, total: int, options: Options) -> float:
    """As the one before, a step further on: its first step already moves."""
    return _cosine_with_min_lr(step + 1, warmup, total, options)


def _warm_from_one(step: int, warmup: int, _total: int, options: Options) -> float:
    """The first step already moves: at 1/warmup of the peak, or from a share that is told."""
    begin = options.get("warmup_lr_rate")
    if begin is None:
        return (step + 1) / max(1, warmup)
    return float(begin + (1.0 - begin) * step / max(1, warmup - 1))


def _stable(step: int, warmup: int, total: int, options: Options) -> float:
    """Hold the peak, then decay to the least: warm-up, stable, decay."""
    least, decay = options.get("min_lr_ratio", 0.0), int(options["num_decay_steps"])
    stable = int(options.get("num_stable_steps", total - warmup - decay))
    done = step - warmup - stable
    if done < 0:
        return 1.0
    if done >= decay:
        return float(least)
    shape = _SHAPES[options.get("decay_type", "cosine")]
    left = shape(done / max(1, decay), options.get("num_cycles", 0.5))
    return float(max(0.0, left * (1 - least) + least))


def _warm_stable(step: int, warmup: int, _total: int, options: Options) -> float:
    least, done = options.get("min_lr_ratio", 0.0), step / max(1, warmup)
    rising = {
        "linear": done,
        "cosine": 0.5 * (1.0 - math.cos(math.pi * done)),
        "1-sqrt": 1.0 - math.sqrt(1.0 - done),
    }
    return float(max(0.0, rising[options.get("warmup_type", "linear")] * (1 - least) + least))


_SHAPES: Mapping[str, Callable[[float, float], float]] = {
    "linear": lambda done, _: 1.0 - done,
    "cosine": lambda done, cycles: 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * done)),
    "1-sqrt": lambda done, _: 1.0 - math.sqrt(done),
}


def _restarts(step: int, warmup: int, total: int, options: Options) -> float:
    done = _done(step, warmup, total)
    if done >= 1.0:
        return 0.0
    angle = math.pi * ((options.get("num_cycles", 1) * done) % 1.0)
    return max(0.0, 0.5 * (1.0 + math.cos(angle)))


def _polynomial(step: int, warmup: int, total: int, options: Options) -> float:
    end, start = options.get("lr_end", 1e-7), options["learning_rate"]
    if step > total:
        return float(end / start)
    left = 1 - _done(step, warmup, total)
    return float(((start - end) * math.pow(left, options.get("power", 1.0)) + end) / start)


def _inverse_sqrt(step: int, warmup: int, _total: int, options: Options) -> float:
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
    "cosine_warmup_with_min_lr": _cosine_from_one,
    "warmup_stable_decay": _stable,
}

WARM_UPS: Mapping[str, Decay] = {
    "cosine_warmup_with_min_lr": _warm_from_one,
    "warmup_stable_decay": _warm_stable,
}
"""Schedules that do not warm up on a line from 0."""
