"""The frame of every runner's process: command line in, events out, exit code at the end."""

import gc
import logging
import os
import platform
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from tuneyard.runners.devices import Device, taken_device
from tuneyard.runners.events import EventLog
from tuneyard.runners.failures import BadSpec, Failure, InputGone, Stopped, diagnose
from tuneyard.runners.stops import Stops
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.exits import ExitCode
from tuneyard.specs.runner import OUTPUT, RunnerSpec

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # Less is kept in fragments when rows differ in length; read when CUDA starts.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


_USUAL, _WHILE_IMPORTING = gc.get_threshold(), (50_000, 10, 10)
"""Thresholds of the garbage collector; by the usual ones it takes a fifth of the imports' time."""


@dataclass(frozen=True)
class Attempt:
    """What the work of a runner is given."""

    spec: RunnerSpec
    workdir: Path
    events: EventLog
    stops: Stops
    device: Device

    @property
    def output(self) -> Path:
        """Where the result becomes visible, whole."""
        return self.workdir / OUTPUT

    def begin(self) -> None:
        """Say that all is loaded and the work begins."""
        self.events.emit("phase", phase="running")
        if gc.get_threshold() == _WHILE_IMPORTING:
            gc.freeze()  # modules stay for good: no collection needs to look at them
            gc.set_threshold(*_USUAL)

    def fresh_aside(self) -> Path:
        """An empty folder where the result is made, whatever an earlier process left in it."""
        aside = self.workdir / ".aside-output"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        return aside

    def input(self, name: str) -> Path:
        """The path of an input. Raises: BadSpec (not named), InputGone (not there)."""
        if name not in self.spec.inputs:
            raise BadSpec(f"The spec names no {name}.", field=f"inputs.{name}")
        path = Path(self.spec.inputs[name])
        if not path.exists():
            raise InputGone(f"The {name} is not at {path}.", field=f"inputs.{name}")
        return path


Work = Callable[[Attempt], None]


def main(work: Work) -> NoReturn:
    """Run the process of one attempt to its end.

    Leaves by os._exit: torch's own teardown takes a while, and its crashes there would turn a
    finished attempt into a lost one.
    """
    gc.set_threshold(*_WHILE_IMPORTING)
    code = run_attempt(work, sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_attempt(work: Work, argv: Sequence[str]) -> int:
    """Do the work that SPEC.json asks for in WORKDIR; the exit code says how it went."""
    # Libraries announce their own removals to their callers' readers; those are no news to a user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        spec, workdir = _read_arguments(argv)
    except TuneyardError as error:
        sys.stderr.write(f"{error.message}\n{error.hint or ''}\n")
        return ExitCode.BAD_SPEC
    events, stops = EventLog(workdir), Stops()
    try:
        stops.listen()
        events.emit("started", pid=os.getpid(), versions=library_versions())
        with taken_device(spec.device) as device:
            work(Attempt(spec, workdir, events, stops, device))
        return ExitCode.DONE
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        return _fail(events, error, spec)


def library_versions() -> Mapping[str, str]:
    """Python's version and those of the libraries that decide about the numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_arguments(argv: Sequence[str]) -> tuple[RunnerSpec, Path]:
    usage = "python -P -m tuneyard.runners.KIND SPEC.json WORKDIR"
    if len(argv) != 2:
        raise BadSpec("Two arguments are needed.", hint=usage)
    workdir = Path(argv[1]).absolute()
    if not workdir.is_dir():
        raise BadSpec(f"{workdir} is not a folder.", hint="make an empty one first")
    if (workdir / OUTPUT).exists():
        raise BadSpec(f"{workdir} has an output already.", hint="take another folder")
    try:
        return RunnerSpec.model_validate_json(Path(argv[0]).read_bytes()), workdir
    except OSError as error:
        raise BadSpec(f"{argv[0]} cannot be read: {error.strerror}.", hint=usage) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadSpec(f"{argv[0]}: {where}: {first['msg']}.", hint=usage) from None


def _fail(events: EventLog, error: Exception, spec: RunnerSpec) -> int:
    """Write the ``failed`` event; the traceback goes to the log, which is stderr."""
    failure: Failure = diagnose(error, spec.arguments)
    if not isinstance(error, TuneyardError):
        traceback.print_exc()
    sys.stderr.write(f"{failure.cause}: {failure.evidence}\n")
    try:
        fields = {"evidence": failure.evidence, "patch": dict(failure.patch)}
        events.emit("failed", cause=failure.cause, **fields)
    except OSError:
        pass  # a full disk: the exit code says it
    return failure.exit_code
