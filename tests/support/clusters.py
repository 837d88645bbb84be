"""Real scheduler and worker processes over a test's database, with short ways to watch them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from support.databases import TestDatabase
from support.yards import wait_for
from tuneyard.models import placements
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.jobs import Submission, cancel_job, submit_job
from tuneyard.models.leadership import lead
from tuneyard.models.placements import QueuedJob
from tuneyard.scheduler.placing import place
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.states import TERMINAL

FAKE_RUNNER = Path(__file__).with_name("fake_runner.py")

PROGRAMS = {
    "scheduler": (
        "import signal, threading; from tuneyard.scheduler.loop import run;"
        "stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set());"
        "run(load_settings(), stop)"
    ),
    "worker": "from tuneyard.workers.main import run; run(load_settings())",
}


@dataclass
class Cluster:
    """Processes of one test, with the folder of its node."""

    db: TestDatabase
    home: Path
    broker_url: str
    settings: Mapping[str, object] = field(default_factory=dict)
    team: UUID = field(init=False)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.team = self.db.a_team()

    def start(self, program: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start the scheduler or the worker."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
        values = {
            "home": self.home,
            "database_url": self.db.url(program),
            "broker_url": self.broker_url,
            "runner_python": FAKE_RUNNER,
            "node_name": "n1",
            "disk_floor_bytes": 0,
            "retry_backoff_s": 0,
            "tick_s": 0.1,
            "poll_s": 0.5,
            "lease_s": 10,
            **self.settings,
            **settings,
        }
        env |= {f"TUNEYARD_{k.upper()}": str(v) for k, v in values.items()}
        code = (
            "import logging; logging.basicConfig(level='INFO');"
            "from tuneyard.specs.settings import load_settings;" + PROGRAMS[program]
        )
        with (self.home / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], env=env, stdout=log, stderr=log
            )
        self.processes[program] = process
        return process

    def kill(self, program: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill a program's process and nothing else."""
        process = self.processes.pop(program)
        process.send_signal(number)
        process.wait(60)

    def submit(self, *, device: str = "cpu", name: str = "", **asked: object) -> UUID:
        """A job of the hashing runner; what it is asked travels as the path of its source."""
        name = name or f"m-{uuid4().hex}"  # each source a name of its own
        document = {"kind": "download", "model_name": name, "source": f"node:/{json.dumps(asked)}"}
        spec, _ = read_spec(document | {"device": device})
        submission = Submission(spec)
        with self.db.api.begin(team=self.team) as tx:
            submit_job(tx, self.team, submission)
        return submission.id

    def place(self, job: UUID) -> AttemptRef:
        """Place a job as the scheduler does, where no scheduler runs."""
        with self.db.scheduler.begin() as tx:
            epoch = lead(tx, "test", term_s=3600)
        assert epoch is not None
        queued = QueuedJob(job, "download", "m", 1, self.job(job).device_kind)
        with self.db.scheduler.begin() as tx:
            chosen = place(queued, placements.free_slots_now(tx, silence_s=60))
            assert chosen is not None
            placed = placements.place_job(tx, queued, chosen, epoch=epoch, lease_s=30)
        assert placed is not None
        return placed.ref

    def cancel(self, job: UUID) -> None:
        """Cancel as the API does."""
        with self.db.api.begin(team=self.team) as tx:
            cancel_job(tx, job)

    def job(self, job: UUID) -> Any:
        """A job's row."""
        return self.db.rows("SELECT * FROM jobs WHERE id = :id", id=job)[0]

    def attempts(self, job: UUID) -> list[Any]:
        """A job's attempts in order."""
        return self.db.rows("SELECT * FROM attempts WHERE job_id = :id ORDER BY number", id=job)

    def wait_state(self, job: UUID, *states: str, within_s: float = 30) -> str:
        """Wait until a job is in one of these states."""
        return wait_for(
            lambda: state if (state := self.job(job).state) in states else None,
            within_s=within_s,
            what=f"one of {states} (now {self.job(job).state}, {self.home})",
        )

    def finish(self, job: UUID, *, within_s: float = 60) -> str:
        """Wait for a job's end."""
        return self.wait_state(job, *(state.value for state in TERMINAL), within_s=within_s)

    def steps(self, job: UUID) -> list[tuple[int, int]]:
        """(attempt's number, step) of every step that was computed and shipped."""
        return [
            (row.number, row.step)
            for row in self.db.rows(
                "SELECT a.number, m.step FROM metrics m JOIN attempts a ON a.id = m.attempt_id"
                " WHERE a.job_id = :id AND m.name = 'loss' ORDER BY a.number, m.step",
                id=job,
            )
        ]

    def wait_checkpoint(self, job: UUID) -> None:
        """Wait until a checkpoint is recorded."""
        sql = "SELECT 1 FROM artifacts WHERE job_id = :id AND kind = 'checkpoint'"
        wait_for(lambda: self.db.rows(sql, id=job), within_s=30, what="a recorded checkpoint")

    def workdir(self, job: UUID) -> Path:
        """The work folder of a job's newest attempt, once there is one."""
        wait_for(lambda: self.attempts(job), within_s=20, what="an attempt")
        return self.home / "work" / f"attempt_{self.attempts(job)[-1].id.hex}"

    def count_in_log(self, said: str) -> int:
        """How often the worker has logged this."""
        return (self.home / "worker.log").read_text().count(said)

    def guard_file(self, job: UUID) -> dict[str, Any]:
        """guard.json of a job's newest attempt, once the runner runs."""
        path = self.workdir(job) / "guard.json"

        def look() -> dict[str, Any] | None:
            try:
                known = json.loads(path.read_text())
            except FileNotFoundError:
                return None
            return known if known.get("runner_pid") else None

        return wait_for(look, within_s=20, what="a runner")

    def diary(self) -> list[dict[str, Any]]:
        """Every take and release of a pretended GPU, as its runners wrote them."""
        files = (self.home / "fake_gpus").glob("*.diary")
        return [json.loads(line) for f in files for line in f.read_text().splitlines()]

    def stop(self) -> None:
        """End everything."""
        for name in list(self.processes):
            self.kill(name, signal.SIGTERM)
