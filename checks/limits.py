"""Checking a file in a child process that can neither fill the memory nor run for ever."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 600.0
MEMORY_BYTES = 1024**3


def check_file(
    path: Path,
    *,
    purpose: str = "dataset",
    python: str = sys.executable,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """The report on a file; a child that crashed or took too long is a report as well."""
    command = [python, "-P", "-m", "tuneyard.checks", str(path), "--purpose", purpose]
    try:
        done = subprocess.run(
            command,
            env={"PYTHONNOUSERSITE": "1", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            preexec_fn=_limits(memory_bytes, int(timeout_s) + 1),
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _failed(f"the check took longer than {timeout_s:.0f} s")
    except ValueError:
        return _failed("the check ended without a report; the file may be built to break it")
    return report


def _limits(memory_bytes: int, cpu_s: int) -> Callable[[], None]:
    def set_limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return set_limits


def _failed(message: str) -> dict[str, Any]:
    problem = {"code": "check_failed", "message": f"The file could not be checked: {message}."}
    empty = {"field": None, "line": None, "column": None, "hint": "split it, or look at its rows"}
    return {"ok": False, "problems": [problem | empty], "problem_count": 1, "rows": 0}
