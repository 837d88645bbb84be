"""The table of moves: complete, closed, and final where it must be."""

import pytest

from tuneyard.specs.states import (
    LIVE,
    TERMINAL,
    TRANSITIONS,
    JobEvent,
    JobState,
    allowed_actions,
    moves,
    next_state,
)


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("event", list(JobEvent))
def test_terminal_is_final(state: JobState, event: JobEvent) -> None:
    assert next_state(state, event) is None


@pytest.mark.parametrize("state", sorted(set(JobState) - TERMINAL))
def test_every_open_state_can_reach_an_end(state: JobState) -> None:
    reached, new = {state}, {state}
    while new:
        new = {to for frm, _, to in moves() if frm in new} - reached
        reached |= new
    assert reached & TERMINAL


@pytest.mark.parametrize("state", sorted(LIVE))
def test_a_live_attempt_may_succeed_whatever_was_asked_of_it(state: JobState) -> None:
    assert next_state(state, JobEvent.SUCCEED) is JobState.SUCCEEDED


def test_a_cancelling_job_ends_cancelled_however_its_attempt_ended() -> None:
    for event in (JobEvent.FAIL, JobEvent.LOSE, JobEvent.RETRY, JobEvent.STOP):
        assert next_state(JobState.CANCELLING, event) is JobState.CANCELLED


def test_only_resume_leaves_a_choice() -> None:
    assert [key for key, to in TRANSITIONS.items() if len(to) > 1] == [
        (JobState.PAUSED, JobEvent.RESUME)
    ]


def test_allowed_actions_follow_the_table() -> None:
    assert allowed_actions(JobState.RUNNING) == ["cancel"]
    assert allowed_actions(JobState.CANCELLING) == []
    assert allowed_actions(JobState.FAILED) == ["retry"]
