"""How soon the API and a worker are ready, from the start of their processes.

    python -P bench/ready.py [--rounds 5]

Starts a yard in a folder of its own, then, round by round, a second API on a free port until
/readyz answers 200, and a second node's worker until it says that it is ready. Prints the rounds
in seconds; the quickest of each must stay below 1.5, as other programs only add to it, or on a
slow machine below 4 times what importing the libraries alone takes there.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]
BOUND_S, OF_IMPORTS = 1.5, 4.0
LIBRARIES = [sys.executable, "-P", "-c", "import celery, fastapi, sqlalchemy"]
GIVE_UP_S = 30.0


def main() -> int:
    """Measure API and worker in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "yard")
        up = [*TUNEYARD, "up", "--home", str(home), "--port", "0", "--detach", "--json"]
        subprocess.run(up, check=True, stdout=subprocess.DEVNULL)
        try:
            times = {"imports": [], "api": [], "worker": []}
            for number in range(rounds):
                began = time.monotonic()
                subprocess.run(LIBRARIES, check=True)
                times["imports"].append(time.monotonic() - began)
                times["api"].append(start_api(home))
                times["worker"].append(start_worker(home, Path(folder, f"node{number}")))
        finally:
            subprocess.run([*TUNEYARD, "down", "--home", str(home)], check=True)
    for name, taken in times.items():
        shown = " ".join(f"{each:.2f}" for each in taken)
        print(f"{name:7}  ready after {min(taken):.2f} s   ({shown})")
    bound = max(BOUND_S, OF_IMPORTS * min(times.pop("imports")))
    return 0 if all(min(taken) < bound for taken in times.values()) else 1


def start_api(home: Path) -> float:
    """Seconds until a new API answers that it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ready() -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return seconds_until(ready, "api", home, {"TUNEYARD_API_PORT": str(port)})


def start_worker(home: Path, node: Path) -> float:
    """Seconds until a new node's worker is ready."""
    node.mkdir()
    log = node / "worker.log"
    environment = {"TUNEYARD_HOME": str(node), "TUNEYARD_NODE_NAME": node.name}
    return seconds_until(
        lambda: "worker ready" in log.read_text(), "worker", home, environment, log
    )


def seconds_until(
    ready: Callable[[], bool],
    program: str,
    home: Path,
    environment: dict[str, str],
    log: Path | None = None,
) -> float:
    """Start a process with the yard's settings; wall seconds until it is ready; stop it."""
    settings = json.loads((home / "run" / f"{program}.settings.json").read_text())
    file = home / "run" / "bench.settings.json"
    file.write_text(json.dumps(settings))
    env = os.environ | {"TUNEYARD_SETTINGS": str(file)} | environment
    with (log or Path(os.devnull)).open("w") as output:
        began = time.monotonic()
        process = subprocess.Popen([*TUNEYARD, program], env=env, stdout=output, stderr=output)
        try:
            while not ready():
                if time.monotonic() - began > GIVE_UP_S or process.poll() is not None:
                    raise SystemExit(f"{program} did not become ready")
                time.sleep(0.01)
            return time.monotonic() - began
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
