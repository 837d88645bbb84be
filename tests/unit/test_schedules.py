"""Learning rates are transformers' own, step by step."""

import json

import pytest
import torch
from transformers import get_scheduler

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.optimizers import schedule_of
from tuneyard.runners.schedules import BY_EVALUATION, DECAYS, schedule, warmup_steps
from tuneyard.specs.optimizing import SCHEDULE_OPTIONS

STEPS, PEAK = 12, 0.02
NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.001},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
CASES = [(name, NEEDED.get(name, {})) for name in sorted(DECAYS)] + [
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 0.004, "num_cycles": 1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3}),
    ("polynomial", {"lr_end": 0.001, "power": 2}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 3, "num_stable_steps": 2, "min_lr_ratio": 0.1}),
    *(
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": kind, "warmup_type": kind})
        for kind in ("linear", "cosine", "1-sqrt")
    ),
]


def an_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(name, options, warmup):
    optimizer = an_optimizer()
    theirs = get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=options)
    ours = schedule(name, warmup=warmup, total=STEPS, learning_rate=PEAK, options=options)
    for step in range(STEPS):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


METRICS = [3.0, 2.5, 2.6, 2.7, 2.4, 2.5, 2.5, 2.5, 2.5, 1.0, 0.9, 0.8, 0.7, 0.6]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reduce_lr_on_plateau", {}),
        ("reduce_lr_on_plateau", {"patience": 1, "factor": 0.5, "cooldown": 1}),
        ("greedy", {"patience": 1, "min_lr": 1e-5}),
        ("greedy", {"patience": 1, "min_lr": 1e-5, "smooth": True, "window_size": 3}),
    ],
)
def test_rates_that_go_by_evaluations_are_those_of_transformers_and_survive_as_json(name, options):
    optimizer = an_optimizer()
    theirs = get_scheduler(name, optimizer, scheduler_specific_kwargs=options)
    rates = []
    ours = schedule(name, warmup=0, total=STEPS, learning_rate=PEAK, options=options)
    for metric in METRICS:
        theirs.step(metric)
        ours.measured(metric)
        rates.append(ours.at(5))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
        again = schedule(name, warmup=0, total=STEPS, learning_rate=PEAK, options=options)
        again.restore(json.loads(json.dumps(ours.state())))
        ours = again
    assert len(set(rates)) > (1 if options else 0)


def test_more_of_a_metric_that_is_better_so_does_not_lower_the_rate():
    arguments = FinetuneArguments.model_validate(
        {
            "model": "m",
            "dataset": "d",
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0},
            "metric_for_best_model": "rewards/accuracies",
            "learning_rate": PEAK,
        }
    )
    rising = schedule_of(arguments, STEPS)
    for metric in (0.5, 0.6, 0.7, 0.8):
        rising.measured(metric)
    assert rising.at(0) == PEAK


def test_every_schedule_that_a_spec_may_name_is_known_here():
    assert set(SCHEDULE_OPTIONS) <= DECAYS.keys() | set(BY_EVALUATION)


def test_warmup_is_a_number_of_steps_or_a_share():
    assert warmup_steps(30, steps=4, ratio=0.5) == 4
    assert warmup_steps(30, steps=0.1, ratio=0) == 3
    assert warmup_steps(31, steps=0, ratio=0.1) == 4
