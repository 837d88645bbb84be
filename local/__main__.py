"""The supervisor's process: what `tuneyard up` leaves behind.

    python -P -m tuneyard.local HOME     # settings by TUNEYARD_*

It writes one line of JSON when all is ready, or why not: {"ready": …} or {"error": …}.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tuneyard.local.home import Home, open_home, unusable
from tuneyard.local.supervisor import Supervisor
from tuneyard.local.yard import Yard, lay_out
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.settings import load_settings


def main(root: str) -> int:
    """Supervise a home until SIGTERM."""
    return supervise(Path(root), lambda home: lay_out(home, load_settings(home=home.root)))


def supervise(root: Path, plan: Callable[[Home], Yard]) -> int:
    """Hold a home and run what is planned for it; exit code 1 when it could not start."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s %(child)s", force=True
    )
    logging.getLogger().handlers[0].addFilter(_name_the_child)
    os.chdir("/")
    try:
        home = open_home(root)
        with home.held():
            yard = plan(home)
            ready = {
                "url": yard.url,
                "flower_url": yard.flower_url,
                "notices": list(yard.notices),
            }
            Supervisor(home, yard.children).run(
                ready=ready, on_ready=lambda: _announce(home, yard, ready)
            )
    except TuneyardError as error:
        return _fail(error)
    except OSError as error:
        return _fail(unusable(root, error))
    return 0


def _announce(home: Home, yard: Yard, ready: Mapping[str, object]) -> None:
    home.write_json(home.profile, yard.profile(home))
    _tell({"ready": ready})


def _fail(error: TuneyardError) -> int:
    logging.getLogger(__name__).error(error.message, extra={"event": "start_failed"})
    _tell({"error": error.as_dict()})
    return 1


def _tell(value: object) -> None:
    """One line for ``up``, which may be gone meanwhile; then the output is closed."""
    line = json.dumps(value) + "\n"
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.write(1, line.encode())
    except OSError:
        pass
    os.dup2(null, 1)
    os.close(null)


def _name_the_child(record: logging.LogRecord) -> bool:
    record.child = getattr(record, "child", "")
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
