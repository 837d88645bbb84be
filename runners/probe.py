"""Say what this interpreter can run:  python -P -m tuneyard.runners.probe [--devices]

Prints JSON. Versions come from the installed metadata, in some 50 ms; --devices imports torch.
"""

import json
import sys
from typing import Any

from tuneyard.runners.attempt import library_versions


def devices() -> dict[str, Any]:
    """What torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cuda": count > 0,
        "cuda_version": torch.version.cuda,
        "names": [torch.cuda.get_device_name(i) for i in range(count)],
        "capabilities": [list(torch.cuda.get_device_capability(i)) for i in range(count)],
    }


def main() -> None:
    """Print one line of JSON."""
    found: dict[str, Any] = {"versions": dict(library_versions())}
    if "--devices" in sys.argv[1:]:
        found["devices"] = devices()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
