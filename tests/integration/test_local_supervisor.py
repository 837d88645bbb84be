"""The supervisor with stand-in children: real processes that do nothing but live and end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneyard.local import processes
from tuneyard.local.down import down
from tuneyard.local.home import Home
from tuneyard.local.processes import ProcessId
from tuneyard.local.status import status
from tuneyard.local.up import up
from tuneyard.specs.errors import InputError, Unavailable

WITHIN_S = 20.0

PROGRAM = """
import json, sys
from pathlib import Path
from tuneyard.local.__main__ import supervise
from tuneyard.local.children import Child
from tuneyard.local.yard import Yard

STAND_IN = '''
import os, signal, sys
name, root, code = sys.argv[1:]
def note(what):
    with open(root + "/diary", "a") as diary:
        diary.write(f"{what} {name}\\\\n")
def stop(*_):
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if code == "deaf" else stop)
note("started")
if code.isdigit():
    print(name, "ends now", flush=True)
    sys.exit(int(code))
if code != "never ready":
    open(f"{root}/ready.{name}", "w").close()
while True:
    signal.pause()
'''

def plan(home):
    def child(name, code="stay", **more):
        argv = (sys.executable, "-I", "-S", "-c", STAND_IN, name, str(home.root), code)
        ready = {} if more.get("once") else {"is_ready": is_ready(home.root / f"ready.{name}")}
        return Child(name, argv, {}, **ready, **more)
    children = tuple(child(**each) for each in json.loads(Path(sys.argv[1]).read_text()))
    return Yard(children, "http://127.0.0.1:1", "http://127.0.0.1:2", "ty-key")

def is_ready(file):
    return lambda process: process.alive and file.exists()

sys.exit(supervise(Path(sys.argv[2]), plan))
"""

THREE: list[dict[str, Any]] = [
    {"name": "first"},
    {"name": "prepare", "code": "0", "stage": 1, "once": True},
    {"name": "second", "stage": 2},
    {"name": "third", "stage": 2},
]


class YardUnderTest:
    """A home whose children a test chooses."""

    def __init__(self, tmp_path: Path) -> None:
        self.home = Home(tmp_path / "a home")
        self.plan = tmp_path / "plan.json"
        self.file = tmp_path / "program.py"
        self.file.write_text(PROGRAM)
        self.has(*THREE)

    def has(self, *children: dict[str, Any]) -> None:
        self.plan.write_text(json.dumps(children))

    @property
    def program(self) -> list[str]:
        return [sys.executable, "-P", str(self.file), str(self.plan)]

    def up(self) -> None:
        assert up(self.home.root, detach=True, program=self.program) == 0

    def supervisor(self) -> ProcessId:
        holder = self.home.holder()
        assert holder is not None
        return holder

    def pids(self) -> dict[str, int]:
        return {each.name: each.pid for each in status(self.home.root).children if each.alive}

    def diary(self) -> list[str]:
        return (self.home.root / "diary").read_text().splitlines()

    def kill_supervisor(self) -> None:
        supervisor = self.supervisor()
        os.kill(supervisor.pid, signal.SIGKILL)
        assert processes.wait_gone(supervisor, within_s=WITHIN_S)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[YardUnderTest]:
    made = YardUnderTest(tmp_path)
    yield made
    down(made.home.root)
    assert made.pids() == {}


def eventually(ask: Callable[[], bool]) -> None:
    assert processes.wait_until(ask, within_s=WITHIN_S), "it did not happen in time"


def test_children_start_in_their_order_and_stop_in_reverse(yard: YardUnderTest) -> None:
    yard.up()
    started = yard.diary()
    assert started[:2] == ["started first", "started prepare"]
    assert set(started[2:]) == {"started second", "started third"}
    assert set(yard.pids()) == {"first", "second", "third"}
    assert down(yard.home.root) == ["first", "second", "third"]
    assert yard.diary()[4:] == ["stopped third", "stopped second", "stopped first"]
    assert down(yard.home.root) == []


def test_up_prints_where_everything_is_as_one_line_of_json(
    yard: YardUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    up(yard.home.root, detach=True, as_json=True, program=yard.program)
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "url": "http://127.0.0.1:1",
        "api_key": "ty-key",
        "flower_url": "http://127.0.0.1:2",
        "home": str(yard.home.root),
    }
    assert json.loads(yard.home.profile.read_text()) == printed
    assert yard.home.profile.stat().st_mode & 0o777 == 0o600


def test_a_killed_child_is_started_again_and_the_others_are_left_alone(
    yard: YardUnderTest,
) -> None:
    yard.up()
    before = yard.pids()
    os.kill(before["second"], signal.SIGKILL)
    eventually(lambda: yard.pids().get("second", before["second"]) != before["second"])
    after = yard.pids()
    assert after | {"second": 0} == before | {"second": 0}
    assert {each.name: each.restarts for each in status(yard.home.root).children} == {
        "first": 0,
        "second": 1,
        "third": 0,
    }


def test_children_outlive_a_killed_supervisor_and_are_taken_over(yard: YardUnderTest) -> None:
    yard.up()
    before = yard.pids()
    yard.kill_supervisor()
    assert yard.pids() == before
    assert status(yard.home.root).phase == "unsupervised"
    yard.up()
    assert yard.pids() == before
    assert status(yard.home.root).phase == "ready"
    os.kill(before["first"], signal.SIGKILL)  # and it is watched again
    eventually(lambda: yard.pids().get("first", before["first"]) != before["first"])


def test_a_child_that_shall_run_otherwise_is_started_anew_at_the_take_over(
    yard: YardUnderTest,
) -> None:
    yard.up()
    before = yard.pids()
    yard.kill_supervisor()
    yard.has(*THREE[:3], {"name": "third", "stage": 2, "settings": "another port"})
    yard.up()
    after = yard.pids()
    assert after["third"] != before["third"]
    assert after | {"third": 0} == before | {"third": 0}
    assert not processes.wait_until(lambda: process_lives(before["third"]), within_s=0.0)


def process_lives(pid: int) -> bool:
    return processes.process_id(pid) is not None


def test_a_child_that_was_not_recorded_in_time_is_replaced_not_doubled(
    yard: YardUnderTest,
) -> None:
    yard.up()
    before = yard.pids()
    yard.kill_supervisor()
    yard.home.forget_record("second")
    yard.up()
    assert yard.pids()["second"] != before["second"]
    assert not process_lives(before["second"])


def test_down_works_without_a_supervisor(yard: YardUnderTest) -> None:
    yard.up()
    yard.kill_supervisor()
    yard.home.forget_record("third")
    assert set(down(yard.home.root)) == {"first", "second", "third"}
    assert yard.diary()[4:] == ["stopped third", "stopped second", "stopped first"]
    assert status(yard.home.root).phase == "stopped"


def test_a_second_up_says_that_the_first_is_running(yard: YardUnderTest) -> None:
    yard.up()
    with pytest.raises(InputError, match=r"already running.*http://127\.0\.0\.1:1") as caught:
        yard.up()
    assert caught.value.code == "already_running"
    assert len(yard.pids()) == 3


def test_a_child_that_ends_at_once_is_told_with_its_log_and_nothing_is_left(
    yard: YardUnderTest,
) -> None:
    yard.has(*THREE, {"name": "broken", "code": "7", "stage": 3})
    with pytest.raises(Unavailable, match="broken ends now") as caught:
        yard.up()
    assert "broken ended at once" in caught.value.message
    assert yard.pids() == {}
    assert yard.home.holder() is None
    assert status(yard.home.root).phase == "stopped"


def test_a_child_that_is_not_ready_in_time_is_named(yard: YardUnderTest) -> None:
    slow = {"name": "slow", "code": "never ready", "stage": 3, "ready_within_s": 0.1}
    yard.has(*THREE, slow)
    with pytest.raises(Unavailable, match="slow was not ready in time"):
        yard.up()


def test_a_child_that_ignores_its_signal_is_killed_at_its_deadline(yard: YardUnderTest) -> None:
    yard.has(*THREE[:2], {"name": "deaf", "code": "deaf", "stage": 2, "stop_within_s": 0.2})
    yard.up()
    begun = time.monotonic()
    assert down(yard.home.root) == ["first", "deaf"]
    assert time.monotonic() - begun < 5.0


def test_a_supervisor_that_cannot_start_says_why(yard: YardUnderTest) -> None:
    yard.file.write_text("raise RuntimeError('a bug')")
    with pytest.raises(Unavailable, match="a bug"):
        yard.up()


def in_the_foreground(yard: YardUnderTest) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from tuneyard.local.up import up\n"
        "sys.exit(up(Path(sys.argv[1]), program=sys.argv[2:]))"
    )
    command = [sys.executable, "-P", "-c", code, str(yard.home.root), *yard.program]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stdout.readline() == b"Tuneyard is up.\n"
    return started


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_up_in_the_foreground_stops_all_at_a_signal(
    yard: YardUnderTest, number: signal.Signals, code: int
) -> None:
    with in_the_foreground(yard) as started:
        eventually(lambda: started.poll() is None and yard.home.profile.exists())
        started.send_signal(number)
        assert started.wait(WITHIN_S) == code
    assert yard.pids() == {}
    assert yard.diary()[4:] == ["stopped third", "stopped second", "stopped first"]


def test_up_in_the_foreground_ends_with_down(yard: YardUnderTest) -> None:
    with in_the_foreground(yard) as started:
        down(yard.home.root)
        assert started.wait(WITHIN_S) == 0


def test_up_in_the_foreground_says_that_its_supervisor_was_killed(yard: YardUnderTest) -> None:
    with in_the_foreground(yard) as started:
        os.kill(yard.supervisor().pid, signal.SIGKILL)
        assert started.wait(WITHIN_S) == 1
        assert started.stderr is not None
        assert b"tuneyard up" in started.stderr.read()
    assert len(yard.pids()) == 3


def test_a_second_signal_ends_the_patience_with_a_child(yard: YardUnderTest) -> None:
    yard.has(*THREE[:2], {"name": "deaf", "code": "deaf", "stage": 2, "stop_within_s": 300.0})
    yard.up()
    supervisor = yard.supervisor()
    os.kill(supervisor.pid, signal.SIGTERM)
    eventually(lambda: status(yard.home.root).phase == "stopping")
    os.kill(supervisor.pid, signal.SIGTERM)
    assert processes.wait_gone(supervisor, within_s=WITHIN_S)
    assert yard.pids() == {}
