"""Checking a file in a child process that can neither fill the memory nor run for ever."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuneyard.checks.report import empty_report

TIMEOUT_S = 600.0
MEMORY_BYTES = 1024**3


def check_file(
    path: Path,
    *,
    purpose: str = "dataset",
    plain: bool = False,
    python: str = sys.executable,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """The report on a file; a child that crashed or took too long is a report as well.

    The child limits itself before it opens the file: preexec_fn is not safe beside threads.
    """
    command = [python, "-P", "-m", "tuneyard.checks", str(path), "--purpose", purpose]
    command += ["--plain"] * plain + [
        "--memory-bytes",
        str(memory_bytes),
        "--cpu-s",
        str(int(timeout_s) + 1),
    ]
    try:
        done = subprocess.run(
            command,
            env={"PYTHONNOUSERSITE": "1", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _failed(f"the check took longer than {timeout_s:.0f} s")
    except ValueError:
        return _failed("the check ended without a report; the file may be built to break it")
    return report


def _failed(message: str) -> dict[str, Any]:
    problem = {
        "code": "check_failed",
        "message": f"The file could not be checked: {message}.",
        "field": None,
        "line": None,
        "hint": "split it, or look at its rows",
        "column": None,
    }
    return empty_report() | {"problems": [problem], "problem_count": 1}
