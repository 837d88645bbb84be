"""Runners started as a person would: a spec, a folder, and what they wrote afterwards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.attempt import Attempt, run_attempt

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Ran:
    """A runner's end: its exit code, and its folder."""

    code: int
    workdir: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, in order."""
        return read_events(self.workdir)

    def of_type(self, type_: str) -> list[dict[str, Any]]:
        """The events of one type."""
        return [event for event in self.events if event["type"] == type_]

    def metric(self, name: str) -> dict[int, float]:
        """Step -> value."""
        found = self.of_type("metric")
        return {e["step"]: e["values"][name] for e in found if name in e["values"]}

    @property
    def failure(self) -> dict[str, Any]:
        """The one ``failed`` event."""
        (event,) = self.of_type("failed")
        return event

    @property
    def adapter_sha256(self) -> str:
        """Of the adapter in output/."""
        content = (self.workdir / "output" / "adapter_model.safetensors").read_bytes()
        return hashlib.sha256(content).hexdigest()

    @property
    def results(self) -> list[dict[str, Any]]:
        """The lines of output/results.jsonl."""
        text = (self.workdir / "output" / "results.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """Whole lines of events.jsonl; none yet where there is no file."""
    path = workdir / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write_spec(
    folder: Path, *, inputs: Mapping[str, Path] | None = None, **spec: Any
) -> tuple[Path, Path]:
    """Write a spec into a new work folder below ``folder``; returns both."""
    workdir = folder / f"work-{len(list(folder.glob('work-*')))}"
    workdir.mkdir(parents=True)
    paths = {name: str(path) for name, path in (inputs or {}).items()}
    content = {"kind": "finetune", "inputs": paths, **spec}
    (workdir / "spec.json").write_text(json.dumps(content))
    return workdir / "spec.json", workdir


def run_here(folder: Path, work: Callable[[Attempt], None], **spec: Any) -> Ran:
    """Run an attempt in this process: no seconds are spent on imports."""
    path, workdir = write_spec(folder, **spec)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(each) for each in signals]
    try:
        code = run_attempt(work, [str(path), str(workdir)])
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
    return Ran(int(code), workdir)


def start_runner(folder: Path, module: str, **spec: Any) -> tuple["subprocess.Popen[bytes]", Path]:
    """Start a runner's process."""
    environment = spec.pop("environment", {})
    path, workdir = write_spec(folder, **spec)
    argv = [sys.executable, "-P", "-m", f"tuneyard.runners.{module}", str(path), str(workdir)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
    with (workdir / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, env=os.environ | settings | environment, stdout=log, stderr=subprocess.STDOUT
        )
    return process, workdir


def run_process(folder: Path, module: str, **spec: Any) -> Ran:
    """Run a runner's process to its end."""
    process, workdir = start_runner(folder, module, **spec)
    return Ran(process.wait(DEADLINE_S), workdir)


def wait_for_event(
    process: "subprocess.Popen[bytes]", workdir: Path, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Read events until one is as wanted; the process must not end before."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for event in read_events(workdir):
            if wanted(event):
                return event
        assert process.poll() is None, (workdir / "log").read_text()
        time.sleep(0.005)
    raise AssertionError(f"no such event in {DEADLINE_S} s")
