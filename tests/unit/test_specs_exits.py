"""What an attempt's end means, rule by rule in the contract's order."""

import pytest

from tuneyard.models.attempts import PastEnds, next_event
from tuneyard.specs.exits import Cause, Outcome, RunnerEnd, StopReason, Verdict, after_stop, judge
from tuneyard.specs.states import JobEvent

FAILED_FOR_GOOD = {"charged": True, "retry": False}


@pytest.mark.parametrize("reason", [None, *StopReason])
def test_exit_code_0_wins_over_any_stop(reason: StopReason | None) -> None:
    assert after_stop(judge(RunnerEnd(code=0)), reason) == Verdict(Outcome.SUCCEEDED)


@pytest.mark.parametrize("end", [RunnerEnd(code=70), RunnerEnd(code=75), RunnerEnd(signal=9)])
def test_a_job_that_ran_too_long_failed_for_good(end: RunnerEnd) -> None:
    verdict = after_stop(judge(end), StopReason.MAX_RUNTIME)
    assert verdict == Verdict(Outcome.FAILED, Cause.MAX_RUNTIME, **FAILED_FOR_GOOD)


@pytest.mark.parametrize("end", [RunnerEnd(code=71), RunnerEnd(signal=9), RunnerEnd()])
def test_an_asked_stop_is_never_charged(end: RunnerEnd) -> None:
    verdict = after_stop(judge(end), StopReason.SHUTDOWN)
    assert (verdict.outcome, verdict.charged) == (Outcome.STOPPED, False)


@pytest.mark.parametrize(
    ("end", "outcome", "cause", "charged", "retry"),
    [
        (RunnerEnd(code=64), Outcome.FAILED, Cause.BAD_SPEC, True, False),
        (RunnerEnd(code=65), Outcome.FAILED, Cause.BAD_DATA, True, False),
        (RunnerEnd(code=66), Outcome.FAILED, Cause.INPUT_GONE, True, False),
        (RunnerEnd(code=70), Outcome.FAILED, Cause.BUG, True, True),
        (RunnerEnd(code=72), Outcome.FAILED, Cause.LOSS_NOT_FINITE, True, True),
        (RunnerEnd(code=1), Outcome.FAILED, Cause.BUG, True, True),
        (RunnerEnd(code=71), Outcome.FAILED, Cause.OUT_OF_MEMORY, True, True),
        (RunnerEnd(signal=9, oom_killed=True), Outcome.FAILED, Cause.OUT_OF_MEMORY, True, True),
        (RunnerEnd(code=73), Outcome.LOST, Cause.DISK_FULL, False, True),
        (RunnerEnd(code=74), Outcome.LOST, Cause.DEVICE_LOST, False, True),
        (RunnerEnd(code=75), Outcome.LOST, Cause.LEASE_FENCED, False, True),
        (RunnerEnd(code=76), Outcome.LOST, Cause.LEASE_FENCED, False, True),
        (RunnerEnd(signal=9), Outcome.LOST, Cause.KILLED, False, True),
        (RunnerEnd(), Outcome.LOST, Cause.GUARD_LOST, False, True),
    ],
)
def test_what_an_unasked_end_means(
    end: RunnerEnd, outcome: Outcome, cause: Cause, charged: bool, retry: bool
) -> None:
    assert judge(end) == Verdict(outcome, cause, charged, retry)


def test_the_third_charged_failure_ends_the_job() -> None:
    bug = judge(RunnerEnd(code=70))
    assert next_event(bug, PastEnds(2, 0, 0)) == (JobEvent.RETRY, None)
    assert next_event(bug, PastEnds(3, 0, 0)) == (JobEvent.FAIL, Cause.BUG)


def test_a_configuration_error_is_never_tried_again() -> None:
    bad = judge(RunnerEnd(code=64))
    assert next_event(bad, PastEnds(1, 0, 0)) == (JobEvent.FAIL, Cause.BAD_SPEC)


def test_losses_are_not_the_jobs_fault_until_there_are_twenty() -> None:
    lost = judge(RunnerEnd())
    assert next_event(lost, PastEnds(0, 19, 0)) == (JobEvent.LOSE, None)
    assert next_event(lost, PastEnds(0, 20, 0)) == (JobEvent.FAIL, Cause.GUARD_LOST)


def test_three_lost_workers_in_a_row_make_a_job_poison() -> None:
    lost = Verdict(Outcome.LOST, Cause.NODE_LOST)
    assert next_event(lost, PastEnds(0, 2, 2)) == (JobEvent.LOSE, None)
    assert next_event(lost, PastEnds(0, 3, 3)) == (JobEvent.FAIL, Cause.POISON)
