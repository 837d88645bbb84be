"""The guard of an attempt, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest

from tuneyard.specs import runner as protocol
from tuneyard.specs.exits import RunnerEnd, StopReason
from tuneyard.specs.settings import Settings
from tuneyard.workers import guard
from tuneyard.workers.guarding import (
    ANSWER_WITHIN_S,
    GUARD_PROGRAM,
    GuardGone,
    GuardLink,
    adopt_guard,
    boottime,
    kill_marked,
    marked_attempts,
    node_identity,
    read_exit_report,
    start_guard,
)
from tuneyard.workers.keeping import Control

WAIT_FOR_EVER = "import signal\nwhile True: signal.pause()"
SAY_READY = "import os, signal, sys\nopen('ready', 'w').close()\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SAY_READY + WAIT_FOR_EVER
POLITE = (
    "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    + SAY_READY
    + WAIT_FOR_EVER
)
LEAKY = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
    os.closerange(0, 100)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open('leaked.new', 'w') as file:
        file.write(str(os.getpid()))
    os.rename('leaked.new', 'leaked')
    while True: signal.pause()
os.wait()
while not os.path.exists('leaked'): pass
"""

Answer = TypeVar("Answer")
Start = Callable[..., GuardLink]


def eventually(ask: Callable[[], Answer], within_s: float = 10.0) -> Answer:
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return answer


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and guard.stat_fields(pid)[:1] not in (["Z"], [])


def runner_pid(link: GuardLink) -> int:
    pid = link.runner_pid()
    assert pid is not None
    return pid


def end_of(link: GuardLink) -> RunnerEnd:
    eventually(lambda: not link.alive())
    end = link.exit()
    assert end is not None
    return end


def ask(link: GuardLink, request: object) -> dict[str, object]:
    """Send a guard one line by hand; its answer."""
    with connect(link.workdir) as client, client.makefile("rb") as answers:
        client.sendall(json.dumps(request).encode() + b"\n")
        return dict(json.loads(answers.readline()))


def status(link: GuardLink) -> dict[str, object]:
    """What a guard knows."""
    return ask(link, {"status": True})


def is_ready(link: GuardLink) -> bool:
    return (link.workdir / "cwd" / "ready").exists()


@pytest.fixture
def mark() -> str:
    return f"attempt_{uuid4().hex}"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "attempt"
    folder.mkdir()
    return folder


@pytest.fixture
def a_guard(workdir: Path, mark: str) -> Iterator[Start]:
    def start(
        code: str,
        *,
        deadline_s: float = 60.0,
        grace_s: float = 1.0,
        folder: Path = workdir,
        cores: set[int] | None = None,
    ) -> GuardLink:
        return start_guard(
            folder,
            [sys.executable, "-I", "-S", "-c", code],
            {"PATH": os.environ["PATH"], protocol.ATTEMPT_MARK: mark},
            deadline=boottime() + deadline_s,
            grace_s=grace_s,
            cores=cores,
        )

    yield start
    assert kill_marked({mark}) == set()


def test_the_guard_and_the_protocol_name_the_same_files() -> None:
    assert guard.GUARD_FILE == protocol.GUARD_FILE
    assert guard.EXIT_FILE == protocol.EXIT_FILE
    assert guard.SOCKET == protocol.GUARD_SOCKET
    assert guard.LOG == protocol.LOG_FILE


@pytest.mark.parametrize("code", [0, 64, 75])
def test_an_exit_code_is_reported(a_guard: Start, code: int) -> None:
    assert end_of(a_guard(f"raise SystemExit({code})")) == RunnerEnd(code=code)


def test_a_signal_and_the_memory_are_reported(a_guard: Start) -> None:
    link = a_guard("import os; kept = b'x' * 40_000_000; os.kill(os.getpid(), 11)")
    assert end_of(link) == RunnerEnd(signal=signal.SIGSEGV)
    report = read_exit_report(link.workdir)
    assert report["maxrss"] > 40_000_000
    assert abs(report["ended_at"] - time.time()) < 60


def test_a_kill_by_a_stranger_is_no_want_of_memory(a_guard: Start) -> None:
    link = a_guard(WAIT_FOR_EVER)
    os.kill(runner_pid(link), signal.SIGKILL)
    assert end_of(link) == RunnerEnd(signal=signal.SIGKILL, oom_killed=False)


def test_a_runner_that_cannot_start_ends_with_127_and_a_sentence(workdir: Path) -> None:
    link = start_guard(
        workdir, ["/no/such/python"], {}, deadline=boottime() + 60.0, grace_s=1.0, cores=None
    )
    assert end_of(link) == RunnerEnd(code=127)
    assert "cannot start" in (workdir / protocol.LOG_FILE).read_text()


def test_both_outputs_are_appended_to_the_log(a_guard: Start, workdir: Path) -> None:
    (workdir / protocol.LOG_FILE).write_text("before\n")
    end_of(a_guard("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')"))
    assert (workdir / protocol.LOG_FILE).read_text() == "before\nout\nerr\n"


def test_the_runner_has_a_clean_environment_and_an_empty_folder(
    a_guard: Start, workdir: Path, mark: str
) -> None:
    end_of(a_guard("import os; print(sorted(os.environ), os.listdir('.'), os.read(0, 1))"))
    log = (workdir / protocol.LOG_FILE).read_text()
    assert log.replace("'LC_CTYPE', ", "") == "['PATH', 'TUNEYARD_ATTEMPT'] [] b''\n"


def test_signals_that_the_guard_ignores_reach_its_runner(a_guard: Start, workdir: Path) -> None:
    end_of(a_guard("from signal import *; print(*map(getsignal, (SIGTERM, SIGHUP)))"))
    assert (workdir / protocol.LOG_FILE).read_text() == "0 0\n"


def test_the_runner_gets_its_cores(a_guard: Start, workdir: Path) -> None:
    core = max(os.sched_getaffinity(0))
    end_of(a_guard("import os; print(os.sched_getaffinity(0))", cores={core}))
    assert (workdir / protocol.LOG_FILE).read_text() == f"{{{core}}}\n"


def test_sigterm_comes_a_grace_before_the_deadline(a_guard: Start) -> None:
    asked = boottime()
    link = a_guard(POLITE, deadline_s=61.0, grace_s=60.0)
    assert end_of(link) == RunnerEnd(code=75)
    assert 1.0 <= boottime() - asked < 30.0


def test_a_runner_that_ignores_sigterm_is_dead_at_the_deadline(a_guard: Start) -> None:
    asked = boottime()
    link = a_guard(DEAF, deadline_s=1.5, grace_s=0.3)
    assert end_of(link) == RunnerEnd(signal=signal.SIGKILL)
    assert 1.5 <= boottime() - asked < 30.0


def test_a_stopped_runner_is_dead_at_the_deadline(a_guard: Start) -> None:
    link = a_guard(DEAF, deadline_s=1.5, grace_s=0.1)
    eventually(lambda: is_ready(link))
    os.kill(runner_pid(link), signal.SIGSTOP)
    assert end_of(link) == RunnerEnd(signal=signal.SIGKILL)


def test_a_deadline_moves_forward_alone(a_guard: Start) -> None:
    first = boottime() + 0.5
    link = a_guard(POLITE, deadline_s=0.5, grace_s=0.0)
    link.extend(first + 60.0)
    link.extend(first + 1.0)
    assert status(link)["deadline"] == first + 60.0
    eventually(lambda: boottime() > first + 0.1)
    assert status(link)["state"] == "running"
    link.stop(5.0)
    assert end_of(link) == RunnerEnd(code=75)


def test_a_deadline_that_has_passed_is_not_revived(a_guard: Start) -> None:
    link = a_guard(DEAF, deadline_s=0.1, grace_s=0.0)
    end_of(link)
    with pytest.raises(GuardGone):
        link.extend(boottime() + 60.0)


def test_a_stop_lets_the_runner_save_its_checkpoint(a_guard: Start) -> None:
    link = a_guard(POLITE)
    eventually(lambda: is_ready(link))
    link.stop(30.0)
    assert end_of(link) == RunnerEnd(code=75)


def test_a_later_stop_with_less_grace_shortens(a_guard: Start) -> None:
    link = a_guard(DEAF)
    eventually(lambda: is_ready(link))
    asked = boottime()
    link.stop(50.0)
    assert status(link)["stopping"] is True
    link.stop(0.1)
    link.stop(50.0)
    assert end_of(link) == RunnerEnd(signal=signal.SIGKILL)
    assert boottime() - asked < 30.0


def test_a_checkpoint_is_asked_for_by_sigusr1(a_guard: Start) -> None:
    link = a_guard(
        "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
        + SAY_READY
        + WAIT_FOR_EVER
    )
    eventually(lambda: is_ready(link))
    assert ask(link, {"checkpoint": True})["state"] == "running"
    assert end_of(link) == RunnerEnd(code=3)


def test_a_grandchild_in_a_session_of_its_own_is_killed(a_guard: Start, workdir: Path) -> None:
    link = a_guard(LEAKY)
    assert end_of(link) == RunnerEnd(code=0)
    leaked = int((workdir / "cwd" / "leaked").read_text())
    assert not exists(leaked)
    report = read_exit_report(workdir)
    assert report["descendants_killed"] == 1
    assert report["unkillable"] == []


def test_the_kernel_kills_the_runner_of_a_killed_guard(a_guard: Start) -> None:
    link = a_guard(DEAF)
    pid = runner_pid(link)
    os.kill(link.pid, signal.SIGKILL)
    eventually(lambda: not exists(pid))
    assert not link.alive()
    assert link.exit() is None
    assert adopt_guard(link.workdir) is None
    with pytest.raises(GuardGone):
        link.extend(boottime())


def test_a_guard_is_no_child_of_the_worker_and_does_not_heed_its_signals(a_guard: Start) -> None:
    link = a_guard(WAIT_FOR_EVER)
    assert int(guard.stat_fields(link.pid)[1]) != os.getpid()
    assert os.getsid(link.pid) != os.getsid(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(link.pid, number)
    assert status(link)["state"] == "running"


def test_a_guard_is_found_again_after_kill_9_of_its_worker(workdir: Path, mark: str) -> None:
    worker = f"""
import os, signal, sys
from pathlib import Path
from tuneyard.workers.guarding import boottime, start_guard
start_guard(Path({str(workdir)!r}), [sys.executable, "-I", "-S", "-c", {POLITE!r}],
            {{"TUNEYARD_ATTEMPT": {mark!r}}}, deadline=boottime() + 60, grace_s=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-P", "-c", worker], check=False)
    assert ended.returncode == -signal.SIGKILL
    link = adopt_guard(workdir)
    assert link is not None
    eventually(lambda: is_ready(link))
    link.extend(boottime() + 90.0)
    link.stop(10.0)
    assert end_of(link) == RunnerEnd(code=75)


def test_a_guard_of_another_life_is_not_adopted(a_guard: Start, workdir: Path) -> None:
    link = a_guard(WAIT_FOR_EVER)
    file = workdir / protocol.GUARD_FILE
    known = json.loads(file.read_text())
    assert known["boot_id"] == node_identity().boot_id
    for change in ({"boot_id": "x"}, {"pid_ns": "x"}, {"start_time": 1}, {"pid": os.getpid()}):
        file.write_text(json.dumps(known | change))
        assert adopt_guard(workdir) is None
    file.write_text(json.dumps(known))
    assert adopt_guard(workdir) == link


def test_a_folder_with_a_very_long_path_has_a_guard(a_guard: Start, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40) / ("longer" * 30)
    folder.mkdir(parents=True)
    link = a_guard(POLITE, folder=folder)
    eventually(lambda: is_ready(link))
    link.stop(10.0)
    assert end_of(link) == RunnerEnd(code=75)


def connect(workdir: Path) -> socket.socket:
    folder = os.open(workdir, os.O_RDONLY)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5.0)
    client.connect(f"/proc/self/fd/{folder}/{protocol.GUARD_SOCKET}")
    os.close(folder)
    return client


RUBBISH = (
    b"hello",
    b"\xff\x00",
    b"{}",
    b"[]",
    b'{"deadline": "soon"}',
    b'{"deadline": NaN}',
    b'{"deadline": 1e999}',
    b'{"deadline": 1' + b"0" * 400 + b"}",
    b'{"stop": {"grace_s": -1}}',
    b'{"stop": {"grace_s": 1' + b"0" * 400 + b"}}",
    b'{"stop": true}',
    b"[" * 10_000,
)


def test_rubbish_gets_one_line_that_says_so(a_guard: Start) -> None:
    link = a_guard(WAIT_FOR_EVER)
    with connect(link.workdir) as client, client.makefile("rb") as answers:
        for rubbish in RUBBISH:
            client.sendall(rubbish + b"\n")
            assert "error" in json.loads(answers.readline()), rubbish
    assert status(link) | {"deadline": 0} == {
        "runner_pid": runner_pid(link),
        "state": "running",
        "deadline": 0,
        "stopping": False,
        "exit": None,
    }


def test_half_a_line_and_an_endless_one_block_nobody(a_guard: Start) -> None:
    link = a_guard(WAIT_FOR_EVER)
    with connect(link.workdir) as half, connect(link.workdir) as endless:
        half.sendall(b'{"sta')
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            endless.sendall(b"x" * 1024**2)
        assert status(link)["state"] == "running"
        half.sendall(b'tus": true}\n')
        assert json.loads(half.recv(4096))["state"] == "running"


def test_a_runner_cannot_extend_its_own_lease(a_guard: Start, workdir: Path) -> None:
    link = a_guard(
        "import socket\nc = socket.socket(socket.AF_UNIX)\nc.connect('../guard.sock')\n"
        "try:\n c.sendall(b'{\"deadline\": 9e9}\\n')\n print(c.recv(100))\n"
        "except OSError: print(b'')\n"
    )
    end_of(link)
    assert (workdir / protocol.LOG_FILE).read_text() == "b''\n"


def test_a_guard_costs_a_few_starts_of_a_bare_interpreter(a_guard: Start, tmp_path: Path) -> None:
    def start_guard_number(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        a_guard("pass", folder=folder)

    def start_interpreter() -> None:
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)

    def seconds(act: Callable[[], object]) -> float:
        begun = time.monotonic()
        act()
        return time.monotonic() - begun

    # Side by side, so that what else this machine does weighs on both.
    pairs = [
        (seconds(lambda n=n: start_guard_number(n)), seconds(start_interpreter)) for n in range(7)
    ]
    guards, bare = zip(*pairs, strict=True)
    assert min(guards) < 8 * min(bare), pairs


def test_a_guard_that_cannot_work_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "attempt"
    folder.mkdir()
    (folder / protocol.GUARD_SOCKET).mkdir()
    with pytest.raises(GuardGone, match=protocol.GUARD_SOCKET):
        start_guard(folder, ["/bin/true"], {}, deadline=boottime() + 9, grace_s=1)


def test_every_process_of_a_marked_attempt_is_found_and_killed(mark: str) -> None:
    kept = {"PATH": os.environ["PATH"], protocol.ATTEMPT_MARK: f"{mark}0"}
    marked = {"PATH": os.environ["PATH"], protocol.ATTEMPT_MARK: mark}
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with (
        subprocess.Popen(command, env=marked, stdin=subprocess.PIPE) as first,
        subprocess.Popen(command, env=marked, stdin=subprocess.PIPE) as second,
        subprocess.Popen(command, env=kept, stdin=subprocess.PIPE) as other,
    ):
        assert set(marked_attempts()[mark]) == {first.pid, second.pid}
        assert kill_marked({mark}) == set()
        assert first.wait() == second.wait() == -signal.SIGKILL
        assert other.poll() is None
        assert mark not in marked_attempts()


def test_a_guard_started_by_a_thread_outlives_it(a_guard: Start) -> None:
    links: list[GuardLink] = []
    thread = threading.Thread(target=lambda: links.append(a_guard(WAIT_FOR_EVER)))
    thread.start()
    thread.join()
    assert status(links[0])["state"] == "running"
    assert exists(runner_pid(links[0]))


def test_the_guard_needs_the_standard_library_alone() -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-S", GUARD_PROGRAM], capture_output=True, check=False, text=True
    )
    assert "ValueError" in ended.stderr
    assert "ModuleNotFoundError" not in ended.stderr


def test_a_hung_guard_keeps_nobody_waiting_and_is_told_later(
    a_guard: Start, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    hung, well = a_guard(POLITE), a_guard(POLITE, folder=other)
    for link in (hung, well):
        eventually(lambda link=link: is_ready(link))
    settings = Settings(home=tmp_path, lease_s=100)
    controls = [Control(settings, boottime(), name=name) for name in ("hung", "well")]
    for control, link in zip(controls, (hung, well), strict=True):
        control.attach(link)
    os.kill(hung.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(3):
            for control in controls:
                control.renewed(boottime() + 50)
        controls[0].stop(StopReason.CANCEL)
        assert time.monotonic() - began < ANSWER_WITHIN_S
        eventually(lambda: status(well)["deadline"] == controls[1].deadline)
    finally:
        os.kill(hung.pid, signal.SIGCONT)
    assert end_of(hung) == RunnerEnd(code=75)
    for control in controls:
        control.close()
