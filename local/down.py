"""`tuneyard down`: stop what runs in a home, with its supervisor or without."""

import signal
from pathlib import Path

from tuneyard.local import processes
from tuneyard.local.home import Home
from tuneyard.local.processes import ProcessId
from tuneyard.local.supervisor import STATE, find_running, running_children

STOP_WITHIN_S = 600.0
"""The supervisor ends by itself much sooner: each child has a deadline of its own."""

UNRECORDED_WITHIN_S = 10.0


def down(root: Path) -> list[str]:
    """Stop everything; the names of what was stopped, none if nothing ran. Again is fine."""
    home = Home(root.expanduser().absolute())
    stopped = running_children(home)
    if (supervisor := home.holder()) is not None:
        stop_supervisor(supervisor)
    if home.lock.exists():
        with home.held():
            for name in reversed(running_children(home)):
                _stop_child(home, name)
            for name in home.children():
                home.forget_record(name)
            home.run(STATE).unlink(missing_ok=True)
    return stopped


def stop_supervisor(supervisor: ProcessId) -> None:
    """Ask a supervisor to stop all, and wait for its end."""
    processes.signal_process(supervisor, signal.SIGTERM)
    processes.wait_gone(supervisor, within_s=STOP_WITHIN_S)


def _stop_child(home: Home, name: str) -> None:
    """Stop what a killed supervisor left."""
    running, record = find_running(home, name), home.record(name)
    by = signal.Signals(record.stop_signal) if record else signal.SIGTERM
    if running is not None:
        within_s = record.stop_within_s if record else UNRECORDED_WITHIN_S
        processes.stop(running, by=by, within_s=within_s)
