"""`tuneyard health`, and that what it asks goes silent when a process does."""

import gc
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.commands import Command
from support.yards import TUNEYARD, wait_for

from tuneyard.local import ports
from tuneyard.local.valkey import RunningValkey


@pytest.fixture
def health(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., int]:
    """Asks with some settings; the exit code."""
    command = Command(monkeypatch, capsys)

    def ask(process: str, **settings: object) -> int:
        for name, value in ({"home": tmp_path} | settings).items():
            monkeypatch.setenv(f"TUNEYARD_{name.upper()}", str(value))
        done = command("health", process)
        assert "Traceback" not in done.err
        return done.code

    return ask


@pytest.mark.parametrize("process", ["scheduler", "worker"])
def test_a_loop_that_turns_is_well_and_one_that_hangs_is_not(
    health: Callable[..., int], tmp_path: Path, process: str
) -> None:
    assert health(process) == 4
    file = tmp_path / f"{process}.beat"
    file.touch()
    assert health(process) == 0
    os.utime(file, (time.time() - 61, time.time() - 61))
    assert health(process) == 4


def test_a_process_that_waits_for_its_database_beats_and_ends_well_at_sigterm(
    health: Callable[..., int], tmp_path: Path
) -> None:
    env = os.environ | {
        "TUNEYARD_HOME": str(tmp_path),
        "TUNEYARD_DATABASE_URL": "postgresql://127.0.0.1:1/nowhere",
        "TUNEYARD_BROKER_URL": "redis://127.0.0.1:1/0",
    }
    processes = {
        name: subprocess.Popen([*TUNEYARD, name], env=env, stderr=subprocess.DEVNULL)
        for name in ("scheduler", "worker")
    }
    for name, process in processes.items():
        wait_for(lambda name=name: health(name) == 0, within_s=20, what="a beat")  # type: ignore[misc]
        os.utime(tmp_path / f"{name}.beat", (0, 0))
        wait_for(lambda name=name: health(name) == 0, within_s=20, what="another beat")  # type: ignore[misc]
        process.terminate()
        assert process.wait(20) == 0


def test_flower_by_its_command_is_well_read_only_and_ends_well_at_sigterm(
    health: Callable[..., int], valkey: RunningValkey
) -> None:
    flower_url = f"http://127.0.0.1:{ports.any_free('127.0.0.1')}/raw"
    env = os.environ | {"TUNEYARD_BROKER_URL": valkey.url, "TUNEYARD_FLOWER_URL": flower_url}
    assert health("flower", flower_url=flower_url) == 4
    with subprocess.Popen([*TUNEYARD, "flower"], env=env) as running:
        wait_for(lambda: health("flower") == 0, within_s=20, what="Flower's answer")
        refused = httpx.post(f"{flower_url}/api/task/revoke/x", trust_env=False)
        assert refused.status_code == 403
        second = subprocess.run(
            [*TUNEYARD, "flower"], env=env, capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert "cannot be listened on: Address already in use. (field flower_url)" in second.stderr
        running.terminate()
        assert running.wait(20) == 0


def test_an_api_without_its_database_is_not_well(
    health: Callable[..., int], tmp_path: Path
) -> None:
    settings = {
        "home": tmp_path,
        "database_url": "postgresql://127.0.0.1:1/nowhere",
        "api_port": ports.any_free("127.0.0.1"),
        "api_host": "0.0.0.0",  # noqa: S104 - as in a container
    }
    env = os.environ | {f"TUNEYARD_{name.upper()}": str(v) for name, v in settings.items()}
    with subprocess.Popen([*TUNEYARD, "api", "--json"], env=env, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert b"api listens" in running.stderr.readline()
        assert health("api", **settings) == 4
        running.terminate()
        assert running.wait(20) == 0
    gc.collect()  # a connection that was left open would be an error here
