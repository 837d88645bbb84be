"""What the end of an attempt means: exit codes, causes, outcomes, and who is charged."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """What a runner says by its exit code. docs/runner-protocol.md has the table."""

    DONE = 0
    BAD_SPEC = 64
    BAD_DATA = 65
    INPUT_GONE = 66
    HUB_UNREACHABLE = 69
    BUG = 70
    OUT_OF_MEMORY = 71
    LOSS_NOT_FINITE = 72
    DISK_FULL = 73
    DEVICE_LOST = 74
    STOPPED_AT_CHECKPOINT = 75
    STOPPED_WITHOUT = 76


class Cause(StrEnum):
    """Why an attempt or a job did not succeed."""

    BAD_SPEC = "bad_spec"
    BAD_DATA = "bad_data"
    INPUT_GONE = "input_gone"
    BUG = "bug"
    OUT_OF_MEMORY = "out_of_memory"
    LOSS_NOT_FINITE = "loss_not_finite"
    DISK_FULL = "disk_full"
    DISK_LOW = "disk_low"
    DEVICE_LOST = "device_lost"
    NODE_LOST = "node_lost"
    GUARD_LOST = "guard_lost"
    HUB_UNREACHABLE = "hub_unreachable"
    KILLED = "killed"
    LEASE_FENCED = "lease_fenced"
    STALLED = "stalled"
    MAX_RUNTIME = "max_runtime"
    STORE_UNREACHABLE = "store_unreachable"
    DEPENDENCY_FAILED = "dependency_failed"
    POISON = "poison"


class StopReason(StrEnum):
    """Why an attempt was asked to stop; stands in ``attempts.stop_reason``."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"
    DRAIN = "drain"
    MAX_RUNTIME = "max_runtime"
    SHUTDOWN = "shutdown"


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RunnerEnd:
    """What the guard saw of a runner's end; ``None`` code and signal: no exit.json was found."""

    code: int | None = None
    signal: int | None = None
    oom_killed: bool = False


@dataclass(frozen=True)
class Verdict:
    """What an attempt's end means for its job.

    charged: counts against the job's own three tries; retry: another try may help.
    """

    outcome: Outcome
    cause: Cause | None = None
    charged: bool = False
    retry: bool = True


MAX_CHARGED = 3
MAX_UNCHARGED = 20
MAX_LOST_WORKERS = 3
"""An attempt that took its worker along this many times in a row makes the job ``poison``."""

_FINAL = {
    ExitCode.BAD_SPEC: Cause.BAD_SPEC,
    ExitCode.BAD_DATA: Cause.BAD_DATA,
    ExitCode.INPUT_GONE: Cause.INPUT_GONE,
}
_NOT_THE_JOBS_FAULT = {
    ExitCode.HUB_UNREACHABLE: Cause.HUB_UNREACHABLE,
    ExitCode.DISK_FULL: Cause.DISK_FULL,
    ExitCode.DEVICE_LOST: Cause.DEVICE_LOST,
}
_UNASKED_STOPS = {ExitCode.STOPPED_AT_CHECKPOINT, ExitCode.STOPPED_WITHOUT}


def after_stop(verdict: Verdict, stop_reason: StopReason | None) -> Verdict:
    """What an end means once it is known whether, and why, the attempt was asked to stop."""
    if stop_reason is None or verdict.outcome is Outcome.SUCCEEDED:
        return verdict
    if stop_reason is StopReason.MAX_RUNTIME:
        return Verdict(Outcome.FAILED, Cause.MAX_RUNTIME, charged=True, retry=False)
    return Verdict(Outcome.STOPPED)


def after_stall(verdict: Verdict) -> Verdict:
    """What an end means when the worker ended a runner that had fallen silent."""
    return Verdict(Outcome.LOST, Cause.STALLED) if verdict.outcome is Outcome.LOST else verdict


def judge(end: RunnerEnd) -> Verdict:
    """Say what an end means. The first rule that matches decides; their order is the contract."""
    if end.code == ExitCode.DONE:
        return Verdict(Outcome.SUCCEEDED)
    if end.code in _FINAL:
        return Verdict(Outcome.FAILED, _FINAL[ExitCode(end.code)], charged=True, retry=False)
    if end.code == ExitCode.OUT_OF_MEMORY or (end.signal is not None and end.oom_killed):
        return Verdict(Outcome.FAILED, Cause.OUT_OF_MEMORY, charged=True)
    if end.code in _NOT_THE_JOBS_FAULT:
        return Verdict(Outcome.LOST, _NOT_THE_JOBS_FAULT[ExitCode(end.code)])
    if end.code in _UNASKED_STOPS:
        return Verdict(Outcome.LOST, Cause.LEASE_FENCED)
    if end.code is not None:
        cause = Cause.LOSS_NOT_FINITE if end.code == ExitCode.LOSS_NOT_FINITE else Cause.BUG
        return Verdict(Outcome.FAILED, cause, charged=True)
    return Verdict(Outcome.LOST, Cause.GUARD_LOST if end.signal is None else Cause.KILLED)
