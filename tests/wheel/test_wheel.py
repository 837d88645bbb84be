"""The wheel in a clean environment, installed by the Dockerfile's own line; needs an index."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.compose import ROOT, dockerfile
from support.wheels import build_wheel, package_files

STARTED = (
    "flower.command",
    "kombu.transport.redis",
    "tuneyard.api.main",
    "tuneyard.local.dashboard",
    "tuneyard.models.migration",
    "tuneyard.scheduler.loop",
    "tuneyard.workers.main",
)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of the image api: the Dockerfile's RUN, with this machine's folders."""
    folder = tmp_path_factory.mktemp("slim")
    wheels = build_wheel(folder).parent
    constraints = (ROOT / "constraints.txt").read_text()
    (wheels / "constraints.txt").write_text(re.sub(r"^torch==.*\n", "", constraints, flags=re.M))
    (script,) = dockerfile()["api-packages"].all("RUN")
    for there, here in (
        ("/opt/tuneyard", str(folder / "opt")),
        ("/wheel/", f"{wheels}/"),
        ("python -m venv", f"{sys.executable} -m venv"),
        ("pip --python", f"{sys.executable} -m pip --quiet --python"),
    ):
        assert there in script
        script = script.replace(there, here)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(["sh", "-ec", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "opt"


def test_the_files_that_were_installed_are_those_that_git_knows(slim: Path) -> None:
    (packages,) = slim.glob("lib/python3.*/site-packages")
    files = (packages / "tuneyard").rglob("*")
    found = {str(f.relative_to(packages)) for f in files if f.is_file() and f.suffix != ".pyc"}
    assert found == package_files()


def test_what_the_containers_start_is_there_and_torch_is_not(slim: Path) -> None:
    program = f"import sys; import {', '.join(STARTED)}; sys.exit('torch' in sys.modules)"
    ask = [str(slim / "bin" / "python"), "-I", "-c"]
    subprocess.run([*ask, program], check=True)
    for heavy in ("torch", "transformers"):
        absent = subprocess.run([*ask, f"import {heavy}"], capture_output=True, text=True)
        assert f"No module named '{heavy}'" in absent.stderr


def test_the_servers_run_from_the_wheel_alone(slim: Path) -> None:
    """tests/integration/test_servers.py once more, its commands from the clean environment."""
    test = [sys.executable, "-P", "-m", "pytest", "-q", "tests/integration/test_servers.py"]
    env = os.environ | {"PROGRAMS": str(slim / "bin")}
    done = subprocess.run(test, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
