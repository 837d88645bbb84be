"""The command as a process: pipes, signals and terminals of all sizes."""

import os
import pty
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from fcntl import ioctl

import pytest
from support.recorded_api import Answer, RecordedApi, a_job, events, ids, moved, page, recorded_api

TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]
WITHIN_S = 20.0
JOB, *JOBS = ids("job", 400)
QUEUED = moved(1, "submit", "queued")
RUNNING = {
    "state": "running", "phase": "running", "attempt": 1, "wait_reason": None,
    "progress": {"done": 8, "total": 32, "unit": "steps", "eta_s": 12.4},
    "metrics": {"loss": 1.25, "tokens_per_s": 812.0, "rss_bytes": 2**30},
}  # fmt: skip


@pytest.fixture
def api() -> Iterator[RecordedApi]:
    with recorded_api() as api:
        api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="succeeded"))
        api.on("GET", f"/jobs/{JOB}/artifacts", page())
        yield api


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What keeps a stream open until the test ends."""
    event = threading.Event()
    yield event
    event.set()


def environment(api: RecordedApi, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH", "LANG")}
    return kept | {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"} | api.env | more


def start(env: Mapping[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*TUNEYARD, *arguments],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    "arguments", [["list", "--limit", "400"], ["list", "--json"], ["logs", JOB], ["--help"]]
)
def test_a_reader_that_has_enough_is_no_error(api: RecordedApi, arguments: list[str]) -> None:
    api.on("GET", "/jobs", page(*(a_job(job, name="n" * 100) for job in JOBS)))
    api.on("GET", f"/jobs/{JOB}/logs", Answer(b"a line of a log\n" * 50_000))
    readable, writable = os.pipe()
    with subprocess.Popen(
        [*TUNEYARD, *arguments], env=environment(api), stdout=writable, stderr=subprocess.PIPE
    ) as process:
        os.close(writable)
        assert os.read(readable, 1)
        os.close(readable)
        _, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["list", "list --json", "--help"])
def test_a_stdout_that_takes_nothing_is_a_sentence(
    api: RecordedApi, arguments: str, redirect: str
) -> None:
    api.on("GET", "/jobs", page(*(a_job(job) for job in JOBS[:20])))
    command = f"exec {shlex.join(TUNEYARD)} {arguments} {redirect}"
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environment(api), stderr=subprocess.PIPE, check=False
    )
    reason = "No space left on device" if "full" in redirect else "Bad file descriptor"
    assert done.stderr.decode() == f"The output cannot be written: {reason}.\n"
    assert done.returncode == 2


@pytest.mark.parametrize("arguments", [["watch", JOB], ["watch", JOB, "--json"]])
def test_ctrl_c_leaves_the_job_alone_and_says_so(
    api: RecordedApi, hold: threading.Event, arguments: list[str]
) -> None:
    api.on("GET", f"/jobs/{JOB}/events", events(QUEUED, open_until=hold))
    with start(environment(api), *arguments) as process:
        assert process.stdout is not None
        assert b"queued" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 130
    assert f"the job goes on; `tuneyard watch {JOB}` looks again" in err.decode()
    assert "Traceback" not in err.decode()
    assert {asked.method for asked in api.asked} == {"GET"}


def test_what_goes_to_a_pipe_has_no_control_codes(api: RecordedApi) -> None:
    api.on(
        "GET", f"/jobs/{JOB}/events", events(QUEUED, RUNNING, moved(2, "succeeded", "succeeded"))
    )
    api.on("GET", "/jobs", page(a_job(JOB)))
    for arguments in (["watch", JOB], ["list"], ["show", JOB]):
        with start(environment(api, COLUMNS="20"), *arguments) as process:
            out, err = process.communicate(timeout=WITHIN_S)
        assert (process.returncode, err) == (0, b"")
        assert b"\x1b" not in out
        assert b"\r" not in out
        assert JOB.encode() in out or arguments[0] == "watch"


def on_a_terminal(env: Mapping[str, str], *arguments: str, columns: int) -> tuple[int, str]:
    """Run on a pseudo-terminal; the exit code and all that was shown."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with subprocess.Popen(
        [*TUNEYARD, *arguments], env=dict(env), stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        shown = b"".join(_pieces(leader))
        os.close(leader)
        return process.wait(WITHIN_S), shown.decode()


def _pieces(leader: int) -> Iterator[bytes]:
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        try:
            piece = os.read(leader, 65_536)
        except OSError:  # how Linux says that the last follower is gone
            return
        if not piece:
            return
        yield piece


def test_a_terminal_shows_a_bar_that_goes_with_the_job(api: RecordedApi) -> None:
    last = moved(2, "succeeded", "succeeded")
    api.on("GET", f"/jobs/{JOB}/events", events(QUEUED, RUNNING, last))
    code, shown = on_a_terminal(environment(api, TERM="xterm"), "watch", JOB, columns=100)
    assert code == 0
    assert "steps 8/32" in shown
    assert "25%" in shown
    assert "loss 1.250" in shown
    assert "tuny succeeded" in shown


def test_the_clock_counts_from_the_attempts_start_not_from_the_watching(api: RecordedApi) -> None:
    began = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    last = moved(2, "succeeded", "succeeded")
    api.on("GET", f"/jobs/{JOB}/events", events(RUNNING | {"started_at": began}, last))
    _, shown = on_a_terminal(environment(api, TERM="xterm"), "watch", JOB, columns=100)
    assert "2:00:0" in shown


@pytest.mark.parametrize("columns", [20, 1])
def test_a_narrow_terminal_is_enough(api: RecordedApi, columns: int) -> None:
    api.on("GET", f"/jobs/{JOB}/events", events(RUNNING, moved(1, "succeeded", "succeeded")))
    api.on("GET", "/jobs", page(a_job(JOB)))
    env = environment(api, TERM="xterm")
    for arguments in (["watch", JOB], ["list"], ["show", JOB]):
        code, shown = on_a_terminal(env, *arguments, columns=columns)
        assert code == 0, shown
        assert "Traceback" not in shown
    assert JOB in shown


def test_a_wide_terminal_shows_ids_in_one_piece(api: RecordedApi) -> None:
    waits = "needs 8 GPUs: 3 of 8 are free"
    api.on("GET", "/jobs", page(a_job(JOB, name="a long name " * 9, wait_reason=waits)))
    code, shown = on_a_terminal(environment(api, TERM="xterm"), "list", columns=80)
    assert code == 0
    assert JOB in shown


def test_colours_are_left_out_where_they_are_not_wanted(api: RecordedApi) -> None:
    api.on("GET", "/jobs", page(a_job(JOB, state="failed")))
    coloured = environment(api, TERM="xterm-256color")
    red = "\x1b[31m"
    assert red in on_a_terminal(coloured, "list", columns=120)[1]
    assert red not in on_a_terminal(coloured | {"NO_COLOR": "1"}, "list", columns=120)[1]


def test_a_dumb_terminal_gets_plain_lines(api: RecordedApi) -> None:
    api.on("GET", f"/jobs/{JOB}/events", events(RUNNING, moved(1, "succeeded", "succeeded")))
    code, shown = on_a_terminal(environment(api, TERM="dumb"), "watch", JOB, columns=80)
    assert code == 0
    assert "\x1b" not in shown


def test_a_terminal_that_cannot_show_a_name_gets_a_question_mark(api: RecordedApi) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, name="naïve 模型"))
    env = environment(api) | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with start(env, "show", JOB) as process:
        out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, err
    assert b"na?ve ??" in out


def test_help_comes_at_once(api: RecordedApi) -> None:
    began = computing_s()
    subprocess.run([*TUNEYARD, "--help"], env=environment(api), check=True, capture_output=True)
    assert computing_s() - began < 2.0  # 0.3 s on an idle machine


def computing_s() -> float:
    """Seconds that children have computed: what else runs here does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


LOADED = """
import sys, tuneyard.cli.main
heavy = {"torch", "transformers", "sqlalchemy", "psycopg", "celery", "fastapi"}
ours = {f"tuneyard.{name}" for name in "api checks local models runners scheduler workers".split()}
sys.exit(", ".join((heavy | ours) & set(sys.modules)))
"""


def test_a_client_loads_no_server(api: RecordedApi) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADED], env=environment(api), capture_output=True, check=False
    )
    assert done.stderr.strip() == b""
