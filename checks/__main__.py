"""python -P -m tuneyard.checks FILE [--purpose dataset|prompts] prints a report as JSON."""

import argparse
import json
import sys
from pathlib import Path

from tuneyard.checks.report import report_on


def main() -> int:
    """Check one file. Exit code 0 whenever a report was printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--purpose", choices=("dataset", "prompts"), default="dataset")
    asked = parser.parse_args()
    json.dump(report_on(asked.file, purpose=asked.purpose), sys.stdout, ensure_ascii=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
