"""`tuneyard up`: start one machine's Tuneyard, say where it is, stay until Ctrl-C."""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tuneyard.local import processes
from tuneyard.local.down import stop_supervisor
from tuneyard.local.home import Home, already_running, open_home, read_json, unusable
from tuneyard.local.processes import ProcessId
from tuneyard.local.supervisor import STATE
from tuneyard.specs.errors import InputError, Unavailable
from tuneyard.specs.settings import PREFIX, load_settings

PROGRAM = (sys.executable, "-P", "-m", "tuneyard.local")
SUPERVISOR = "supervisor"
LOOK_EVERY_S = 0.2
INTERRUPTED = 130
DIED = 1


def up(
    root: Path,
    *,
    port: int | None = None,
    root_path: str | None = None,
    detach: bool = False,
    as_json: bool = False,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Start everything, print where it is, and stay until Ctrl-C unless ``detach``.

    environ: TUNEYARD_* settings in it are passed on to every process.
    Returns: the exit code. Raises: InputError, Unavailable when it does not start.
    """
    environ = dict(os.environ if environ is None else environ)
    if port is not None:
        environ[PREFIX + "API_PORT"] = str(port)
    if root_path is not None:
        environ[PREFIX + "ROOT_PATH"] = root_path
    home = open_home(root)
    load_settings(environ, home=home.root)  # what is wrong in them is said at once
    if home.holder() is not None:
        raise already_running(home)
    errors = Console(stderr=True)
    with _Interrupts() as interrupts:
        supervisor, answers = _start_supervisor(home, environ, program)
        ready = _await_ready(home, supervisor, answers, errors, interrupts)
        if ready is not None:
            _show(home, ready, errors, as_json=as_json)
            if detach:
                return 0
            return _stay(home, supervisor, errors, interrupts)
        _stop(supervisor, errors)
        return interrupts.exit_code


class _Interrupts:
    """SIGINT, SIGTERM and SIGHUP as a flag, so that everything is stopped in order."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.heard = 0

    def __enter__(self) -> "_Interrupts":
        self._before = {number: signal.signal(number, self._hear) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _frame: object) -> None:
        self.heard = number

    @property
    def exit_code(self) -> int:
        """Ctrl-C is 130; whoever sends SIGTERM expects an orderly end."""
        return INTERRUPTED if self.heard == signal.SIGINT else 0


def _start_supervisor(
    home: Home, environ: Mapping[str, str], program: Sequence[str]
) -> tuple[ProcessId, int]:
    """Start it in a session of its own; the descriptor is where its one line comes from."""
    readable, writable = os.pipe()
    try:
        process = processes.start(
            [*program, str(home.root)], env=environ, log=home.log(SUPERVISOR), stdout=writable
        )
    except OSError as error:
        os.close(readable)
        raise unusable(home.root, error) from None
    finally:
        os.close(writable)
    return process, readable


def _await_ready(
    home: Home, supervisor: ProcessId, answers: int, errors: Console, interrupts: _Interrupts
) -> dict[str, Any] | None:
    """The supervisor's answer; None when a signal came first. Raises what kept it from starting."""
    text = b""
    with errors.status("starting") as spinner, os.fdopen(answers, "rb", buffering=0) as stream:
        while not interrupts.heard:
            if select.select([stream], [], [], LOOK_EVERY_S)[0]:
                if not (received := stream.read(65_536)):
                    break
                text += received
            waiting = read_json(home.run(STATE)).get("waiting_for", [])
            spinner.update(f"starting {', '.join(waiting)}")
    if interrupts.heard:
        return None
    answer: dict[str, Any] = json.loads(text) if text else {}
    if "ready" in answer:
        return dict(answer["ready"])
    processes.wait_gone(supervisor, within_s=5.0)
    raise _failure(home, answer.get("error"))


def _failure(home: Home, error: dict[str, Any] | None) -> Exception:
    if error is None:
        log = home.log(SUPERVISOR)
        return Unavailable(
            f"The supervisor ended:\n{processes.last_lines(log)}", code="start_failed"
        )
    kind = Unavailable if error["code"] in (Unavailable.code, "start_failed") else InputError
    return kind(error["message"], code=error["code"], field=error["field"], hint=error["hint"])


def _show(home: Home, ready: Mapping[str, Any], errors: Console, *, as_json: bool) -> None:
    """Print where everything is: the profile as one line of JSON, or a table."""
    for notice in ready["notices"]:
        errors.print(notice, markup=False, soft_wrap=True)
    profile = read_json(home.profile)
    if as_json:
        sys.stdout.write(json.dumps(profile) + "\n")
        sys.stdout.flush()
        return
    lines = {
        "API": profile["url"],
        "API docs": f"{profile['url']}/docs",
        "Flower": f"{profile['url']}/flower/",
        "API key": f"in {home.profile}",
        "logs": home.root / "logs",
    }
    text = "\n".join(
        f"  [bold]{name:9}[/bold] {escape(str(value))}" for name, value in lines.items()
    )
    Console().print("Tuneyard is up.", text, sep="\n", soft_wrap=True, highlight=False)


def _stay(home: Home, supervisor: ProcessId, errors: Console, interrupts: _Interrupts) -> int:
    """Wait for a signal, or for the supervisor's end."""
    while not interrupts.heard:
        if processes.reap(supervisor) is not None or not supervisor.alive:
            return _ended(home, errors)
        time.sleep(LOOK_EVERY_S)
    _stop(supervisor, errors)
    return interrupts.exit_code


def _ended(home: Home, errors: Console) -> int:
    """The supervisor is gone: by `tuneyard down`, which leaves no state behind, or by force."""
    if not home.run(STATE).exists():
        return 0
    errors.print(
        "The supervisor was killed; what it started goes on. "
        "`tuneyard up` takes it over, `tuneyard down` stops it.",
        soft_wrap=True,
    )
    return DIED


def _stop(supervisor: ProcessId, errors: Console) -> None:
    with errors.status("stopping"):
        stop_supervisor(supervisor)
        processes.reap(supervisor)
