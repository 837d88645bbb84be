"""API and worker are ready soon after their processes start."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "ready.py"


def test_api_and_worker_are_ready_in_less_than_a_second_and_a_half() -> None:
    done = subprocess.run(
        [sys.executable, "-P", BENCH, "--rounds", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
