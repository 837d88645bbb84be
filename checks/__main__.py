"""python -P -m tuneyard.checks FILE [--purpose WHAT] [--plain] prints a report as JSON."""

import argparse
import json
import resource
import sys
from pathlib import Path

from tuneyard.checks.report import report_on


def main() -> int:
    """Check one file. Exit code 0 whenever a report was printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--purpose", choices=("dataset", "prompts"), default="dataset")
    parser.add_argument("--plain", action="store_true", help="the file may be plain text")
    parser.add_argument("--memory-bytes", type=int, help="address space at most")
    parser.add_argument("--cpu-s", type=int, help="seconds of CPU time at most")
    asked = parser.parse_args()
    _limit(resource.RLIMIT_AS, asked.memory_bytes)
    _limit(resource.RLIMIT_CPU, asked.cpu_s)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)
    json.dump(
        report_on(asked.file, purpose=asked.purpose, plain=asked.plain),
        sys.stdout,
        ensure_ascii=True,
    )
    return 0


def _limit(what: int, most: int | None) -> None:
    if most is not None:
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    sys.exit(main())
