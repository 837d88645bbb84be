"""The folder of one machine's Tuneyard: where its files lie, and who holds it.

HOME/lock              pid and start time of the supervisor, which holds it by flock
HOME/profile.json      url, api_key, flower_url: what the command line reads
HOME/run/              the supervisor's state, a record and the settings of each child
HOME/secrets/          made once, 0600
HOME/logs/             a log for each child
HOME/postgres, valkey  the servers' own folders
HOME/chat_history      what was typed into `tuneyard chat`, 0600
"""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneyard.local.credentials import write_private
from tuneyard.local.processes import ProcessId, boot_id, process_id
from tuneyard.specs.errors import InputError

OWN_NAMES = frozenset({"lock", "profile.json", "run", "chat_history"})
FOLDERS = ("run", "secrets", "logs")


@dataclass(frozen=True)
class Record:
    """A child as the next supervisor finds it."""

    pid: int
    start_time: int
    boot_id: str
    started_at: float  # Unix seconds
    restarts: int
    fingerprint: str
    stop_signal: int
    stop_within_s: float

    @property
    def process(self) -> ProcessId:
        """The process that it names, alive or not; of an earlier boot, one that cannot live."""
        return ProcessId(self.pid, self.start_time if self.boot_id == boot_id() else -1)


@dataclass(frozen=True)
class Home:
    """One home; the paths in it."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the supervisor."""
        return self.root / "lock"

    @property
    def profile(self) -> Path:
        """What the command line reads."""
        return self.root / "profile.json"

    def log(self, name: str) -> Path:
        """Where a child's outputs go."""
        return self.root / "logs" / f"{name}.log"

    def secret(self, name: str) -> Path:
        """One secret."""
        return self.root / "secrets" / name

    def run(self, name: str) -> Path:
        """A file about what runs now."""
        return self.root / "run" / name

    def write_json(self, file: Path, value: Mapping[str, Any]) -> None:
        """Write a file whole, for its owner alone."""
        write_private(file, json.dumps(value) + "\n")

    def record(self, child: str) -> Record | None:
        """What is known of a child."""
        known = read_json(self.run(f"{child}.json"))
        try:
            return Record(**known) if known else None
        except TypeError:  # of another version
            return None

    def keep_record(self, child: str, record: Record) -> None:
        """Remember a child for the next supervisor, ``down`` and ``status``."""
        self.write_json(self.run(f"{child}.json"), asdict(record))

    def forget_record(self, child: str) -> None:
        """The child is gone for good."""
        self.run(f"{child}.json").unlink(missing_ok=True)

    def children(self) -> list[str]:
        """Names of all recorded children, in the order in which they were started."""
        names = [file.stem for file in (self.root / "run").glob("*.json")]
        known = [(record, name) for name in names if (record := self.record(name))]
        return [name for record, name in sorted(known, key=lambda pair: pair[0].started_at)]

    def holder(self) -> ProcessId | None:
        """The living supervisor, if any; a lock that a killed one left says nothing."""
        try:
            pid, start_time, boot = self.lock.read_text().split()
            supervisor = ProcessId(int(pid), int(start_time))
        except (OSError, ValueError):
            return None
        return supervisor if boot == boot_id() and supervisor.alive else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the home. Raises: InputError when another does."""
        with self.lock.open("a+") as file:
            if not _try_lock(file.fileno()):
                raise already_running(self)
            me = process_id(os.getpid())
            assert me is not None  # noqa: S101 - we are alive
            file.truncate(0)
            file.write(f"{me.pid} {me.start_time} {boot_id()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def already_running(home: Home) -> InputError:
    """What a second ``up`` is told."""
    url = read_json(home.profile).get("url")
    return InputError(
        f"Tuneyard is already running in {home.root}" + (f": {url}" if url else "."),
        code="already_running",
        hint="`tuneyard status` shows it, `tuneyard down` stops it, --home picks another folder",
    )


def open_home(root: Path) -> Home:
    """Make a home, or open the one that is there. Raises: InputError with the mend."""
    root = Path(os.path.abspath(root.expanduser()))
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(root)
        for name in FOLDERS:
            (root / name).mkdir(exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=root / "run") as probe:
            probe.write(b" " * 4096)
    except OSError as error:
        raise unusable(root, error) from None
    return Home(root)


def unusable(root: Path, error: OSError) -> InputError:
    """Say in a sentence why a home cannot be used."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"The disk of {root} is full.",
            code="disk_full",
            hint="free some space, or pick another folder with --home",
        )
    return InputError(
        f"{root} cannot be used as a home: {error.strerror or error}.",
        code="bad_home",
        hint="pick a folder that you may write to with --home",
    )


def read_json(file: Path) -> dict[str, Any]:
    """A file that was written whole; empty where there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_foreign(root: Path) -> None:
    names = {entry.name for entry in root.iterdir()}
    if names and not names & OWN_NAMES:
        raise InputError(
            f"{root} holds other files ({sorted(names)[0]}, …): it is no home of Tuneyard.",
            code="bad_home",
            hint="pick an empty or a new folder with --home",
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
