"""A worker's supervisor and keepers in this process, on real PostgreSQL; the runner hashes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from support.clusters import FAKE_RUNNER, Cluster
from support.databases import TestDatabase
from support.yards import wait_for

from tuneyard.models.attempts import AttemptRef
from tuneyard.specs.settings import Settings
from tuneyard.workers import keeping
from tuneyard.workers import supervisor as supervising
from tuneyard.workers.guarding import kill_marked
from tuneyard.workers.supervisor import Supervisor, register


@pytest.fixture
def cluster(db: TestDatabase, tmp_path: Path) -> Cluster:
    """Short ways to submit and place; it starts no process."""
    return Cluster(db, tmp_path / "home", "redis://127.0.0.1:1/0")


@pytest.fixture
def a_supervisor(db: TestDatabase, tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """A registered supervisor, none of whose threads has been started."""
    made: list[Supervisor] = []

    def make(**more: object) -> Supervisor:
        values = {
            "home": tmp_path / "home",
            "database_url": SecretStr(db.url("worker")),
            "runner_python": str(FAKE_RUNNER),
            "node_name": "n1",
            "disk_floor_bytes": 0,
            "cpu_slots": 2,
        } | more
        supervisor = register(Settings(**values), {}, threading.Event())
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        for keeper in supervisor.keepers.values():
            keeper.fence()
            assert keeper.done.wait(20)
        supervisor.node.db.close()


def lease_of(db: TestDatabase, ref: AttemptRef) -> object:
    sql = "SELECT lease_expires_at FROM members WHERE attempt_id = :id"
    return db.rows(sql, id=ref.id)[0][0]


def test_leases_are_renewed_while_a_claim_waits_for_the_database(
    db: TestDatabase, cluster: Cluster, a_supervisor: Callable[..., Supervisor]
) -> None:
    supervisor = a_supervisor()
    first = cluster.place(cluster.submit(steps=10_000))
    supervisor.look()
    second = cluster.place(cluster.submit())
    before = lease_of(db, first)
    with db.owner.begin() as tx:
        tx.execute(text("SELECT 1 FROM members WHERE attempt_id = :a FOR UPDATE"), {"a": second.id})
        looking = threading.Thread(target=supervisor.look)
        looking.start()
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_for(lambda: db.rows(waiting), within_s=10, what="a claim that waits")
        supervisor.renew()
        assert looking.is_alive()
    looking.join(10)
    assert lease_of(db, first) > before
    assert {first.id, second.id} == set(supervisor.keepers)


def test_a_claim_that_comes_while_the_worker_begins_to_stop_is_given_back(
    cluster: Cluster, a_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = a_supervisor()
    job = cluster.submit()
    cluster.place(job)
    claim = supervisor._claim

    def claim_and_be_told_to_stop(ref: AttemptRef) -> bool:
        claimed = claim(ref)
        supervisor.shut_down(keep_runners=False)
        return claimed

    monkeypatch.setattr(supervisor, "_claim", claim_and_be_told_to_stop)
    supervisor.look()
    assert supervisor.keepers == {}
    assert cluster.job(job).state == "queued"
    (attempt,) = cluster.attempts(job)
    assert (attempt.outcome, attempt.stop_reason) == ("stopped", "shutdown")


def test_devices_are_not_handed_on_while_a_process_outlives_its_killing(
    db: TestDatabase,
    cluster: Cluster,
    a_supervisor: Callable[..., Supervisor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supervisor = a_supervisor()
    really_left = keeping.still_there

    def one_is_left(workdir: Path, attempt: str) -> set[int]:
        left = really_left(workdir, attempt)
        return left | {1} if (workdir / "exit.json").exists() else left

    monkeypatch.setattr(keeping, "still_there", one_is_left)
    monkeypatch.setattr(keeping, "HELD_TOO_LONG_S", 0.3)
    job = cluster.submit()
    ref = cluster.place(job)
    supervisor.look()
    keeper = supervisor.keeper_of(ref.id)
    assert keeper is not None
    assert keeper.done.wait(20)
    assert cluster.job(job).state == "succeeded"
    (member,) = db.rows("SELECT exit FROM members")
    assert {"code", "maxrss", "oom_killed", "unkillable", "ended_at"} <= member.exit.keys()

    def device_state() -> str:
        return str(db.rows("SELECT state FROM devices")[0].state)

    monkeypatch.setattr(supervising, "kill_marked", lambda _: {1})
    supervisor.clear_devices()
    assert device_state() == "unconfirmed"
    monkeypatch.setattr(supervising, "kill_marked", kill_marked)
    supervisor.clear_devices()
    assert device_state() == "ok"
