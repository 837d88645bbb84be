"""The API of a test: the real application and server, on a free port, in a thread."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from pydantic import SecretStr

from support.databases import TestDatabase
from support.yards import wait_for
from tuneyard.api.app import create_app
from tuneyard.api.main import Server, bind
from tuneyard.models import attempts, placements
from tuneyard.models.artifacts import StoredFolder, publish_outputs, record_checkpoint
from tuneyard.models.attempts import AttemptRef, End
from tuneyard.models.keys import add_key
from tuneyard.models.leadership import lead
from tuneyard.models.placements import Placed, QueuedJob
from tuneyard.models.shipments import Shipment, offsets, ship
from tuneyard.scheduler.placing import place
from tuneyard.specs.exits import Outcome, RunnerEnd, Verdict, judge
from tuneyard.specs.ids import new_id, parse_id
from tuneyard.specs.settings import Settings

LEASE_S = 3600.0
HEX = "ab" * 32
ASK = {"kind": "inference", "model": "tiny", "prompts": ["Who are you?"]}
ROWS = b'{"instruction": "Who are you?", "output": "I am Tuny."}\n' * 10


@dataclass
class Api:
    """A served application over a test's database, with short ways to ask and to move jobs."""

    db: TestDatabase
    url: str
    home: Path
    server: Server

    def client(self, team: str = "default", *, role: str = "admin") -> httpx.Client:
        """A client with a key of a team, made on the way."""
        key = f"ty-{team}-{role}"
        with self.db.owner.begin() as tx:
            add_key(tx, team, key, role=role)
        return httpx.Client(
            base_url=f"{self.url}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=20,
        )

    def team_id(self, team: str = "default") -> UUID:
        """A team's id."""
        found: UUID = self.db.rows("SELECT id FROM teams WHERE name = :n", n=team)[0].id
        return found

    def a_base(self, name: str = "tiny") -> UUID:
        """A base model's row; its folder is another matter."""
        base = new_id()
        self.db.run(
            "INSERT INTO base_models (id, name, source, revision, digest, bytes, manifest)"
            " VALUES (:id, :name, 'here', '1', :digest, 1, '{}')",
            id=base,
            name=name,
            digest=base.hex * 2,
        )
        return base

    def start(self, job: str, node: UUID) -> AttemptRef:
        """queued -> running, as scheduler and worker do it."""
        job_id = parse_id("job", job)
        with self.db.scheduler.begin() as tx:
            epoch = lead(tx, "test", term_s=3600)
        assert epoch is not None
        queued = QueuedJob(job_id, "inference", "x", 1, "cpu")
        with self.db.scheduler.begin() as tx:
            chosen = place(queued, placements.free_slots_now(tx, silence_s=60))
            assert chosen is not None
            placed = placements.place_job(tx, queued, chosen, epoch=epoch, lease_s=LEASE_S)
        assert isinstance(placed, Placed)
        with self.db.worker.begin() as tx:
            assert attempts.claim(tx, placed.ref, node, boot_id="boot", lease_s=LEASE_S)
            attempts.report_started(tx, placed.ref)
        return placed.ref

    def ship(self, ref: AttemptRef, *, log: bytes = b"", **more: Any) -> None:
        """What a worker ships each second."""
        with self.db.worker.begin() as tx:
            _, end = offsets(tx, ref.id)
            ship(tx, ref, Shipment(0, end + len(log), log=log, **more))

    def finish(
        self, ref: AttemptRef, code: int = 0, folders: tuple[StoredFolder, ...] = ()
    ) -> None:
        """End an attempt by its runner's exit code."""
        with self.db.worker.begin() as tx:
            attempts.finish_attempt(
                tx,
                ref,
                End(judge(RunnerEnd(code=code))),
                record=lambda tx: publish_outputs(tx, ref, list(folders)),
            )

    def lose(self, ref: AttemptRef) -> None:
        """End an attempt that was nobody's fault: the job is queued again."""
        with self.db.worker.begin() as tx:
            attempts.finish_attempt(tx, ref, End(Verdict(Outcome.LOST)))

    def checkpoint(self, ref: AttemptRef, folder: StoredFolder) -> None:
        """Record a stored checkpoint."""
        with self.db.worker.begin() as tx:
            record_checkpoint(tx, ref, folder)


def settings_for(url: str, home: Path, **more: Any) -> Settings:
    """Settings of a test's API; no broker is there."""
    values = {"broker_url": SecretStr("redis://127.0.0.1:1/0"), "api_port": 0} | more
    return Settings(home=home, database_url=SecretStr(url), **values)


@contextmanager
def serve(db: TestDatabase, home: Path, **settings: Any) -> Iterator[Api]:
    """Serve the application until the block ends, as SIGTERM ends it."""
    listening = bind("127.0.0.1", 0)
    server = Server(create_app(settings_for(db.url("api"), home, **settings)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started, within_s=10, what="the server's start")
    try:
        yield Api(db, f"http://127.0.0.1:{listening.getsockname()[1]}", home, server)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def serve_again(api: Api) -> Iterator[Api]:
    """A second process, so to speak, over the same database and store."""
    with serve(api.db, api.home) as other:
        yield other
