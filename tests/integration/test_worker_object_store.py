"""Real scheduler and worker over a real object store, which is killed at bad moments."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.clusters import Cluster
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.object_stores import ACCESS_KEY, SECRET_KEY, Gate, ObjectServer
from support.yards import wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.specs.settings import Settings
from tuneyard.store.remote import Store, open_store


@pytest.fixture
def a_cluster(
    db: TestDatabase, valkey: RunningValkey, tmp_path: Path, object_server: ObjectServer
) -> Iterator[Callable[..., Cluster]]:
    """Make a running cluster whose store is the object server, or a gate before it."""
    made: list[Cluster] = []

    def make(*, endpoint: str | None = None, **settings: object) -> Cluster:
        home = tmp_path / "home"
        home.mkdir()
        store = object_server.environment(f"worker-{tmp_path.name}", endpoint=endpoint)
        cluster = Cluster(db, home, valkey.url, store | settings)
        made.append(cluster)
        cluster.start("scheduler")
        cluster.start("worker")
        return cluster

    yield make
    for cluster in made:
        cluster.stop()
        logged = (cluster.home / "worker.log").read_text()
        assert "Traceback" not in logged
        assert ACCESS_KEY not in logged
        assert SECRET_KEY not in logged
    assert broken_invariants(db) == {}


@pytest.fixture
def store(tmp_path: Path, object_server: ObjectServer) -> Store:
    """The same store, as another process sees it."""
    settings = object_server.settings(f"worker-{tmp_path.name}")
    return open_store(Settings(home=tmp_path / "other", **settings))


def resumed_at(cluster: Cluster, job: object) -> int:
    first, second = cluster.attempts(job)  # type: ignore[arg-type]
    steps = cluster.steps(job)  # type: ignore[arg-type]
    assert {number for number, _ in steps} == {first.number, second.number}
    return min(step for number, step in steps if number == second.number)


def test_a_job_resumes_from_a_checkpoint_on_s3_and_its_output_and_log_lie_there(
    a_cluster: Callable[..., Cluster], store: Store, tmp_path: Path
) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=200, step_s=0.05, save_steps=5)
    cluster.wait_checkpoint(job)
    os.kill(cluster.guard_file(job)["runner_pid"], signal.SIGKILL)
    assert cluster.finish(job) == "succeeded"
    assert resumed_at(cluster, job) > 1
    (model,) = cluster.db.rows("SELECT id, digest FROM base_models")
    target = tmp_path / "fetched"
    store.fetch_folder("models", model.id, target, digest=model.digest, aside=tmp_path / "aside")
    assert (target / "state.json").exists()
    logs = "SELECT x.id FROM attempts a JOIN artifacts x ON x.id = a.log_artifact"
    wait_for(lambda: len(cluster.db.rows(logs)) == 2, within_s=15, what="both logs' archives")
    assert cluster.db.rows("SELECT 1 FROM log_chunks") == []
    recorded = {row.id for row in cluster.db.rows("SELECT id FROM artifacts")}
    assert set(store.ids("artifacts")) <= recorded
    assert not (cluster.home / "store").exists()


def test_a_store_that_dies_while_a_result_is_published_is_asked_again(
    a_cluster: Callable[..., Cluster], object_server: ObjectServer
) -> None:
    gate = Gate(object_server.ports["s3.port"], b"/models/")
    cluster = a_cluster(endpoint=gate.endpoint)
    job = cluster.submit(steps=4)
    assert gate.reached.wait(30), "nothing was published"
    object_server.kill()
    gate.opened.set()
    log = cluster.home / "worker.log"
    wait_for(lambda: "store awaited" in log.read_text(), within_s=30, what="a pause of the worker")
    assert cluster.job(job).state == "running"
    held = "SELECT 1 FROM allocations WHERE released_at IS NULL"
    assert cluster.db.rows(held) == []  # the device is another's meanwhile
    object_server.start()
    assert cluster.finish(job) == "succeeded"
    (attempt,) = cluster.attempts(job)
    assert attempt.outcome == "succeeded"
    gate.close()


def test_a_worker_that_dies_while_it_publishes_is_followed_by_one_that_ends_the_upload(
    a_cluster: Callable[..., Cluster], object_server: ObjectServer, store: Store
) -> None:
    gate = Gate(object_server.ports["s3.port"], b"/models/")
    cluster = a_cluster(endpoint=gate.endpoint)
    job = cluster.submit(steps=4)
    assert gate.reached.wait(30), "nothing was published"
    cluster.kill("worker")
    gate.opened.set()
    cluster.start("worker")
    assert cluster.finish(job) == "succeeded"
    assert len(cluster.attempts(job)) == 1
    (model,) = cluster.db.rows("SELECT id FROM base_models")
    assert store.ids("models") == [model.id]
    gate.close()


def test_a_store_that_stays_away_costs_an_uncharged_attempt_and_no_checkpoint(
    a_cluster: Callable[..., Cluster], object_server: ObjectServer
) -> None:
    cluster = a_cluster(store_patience_s=0, retry_backoff_s=1)
    job = cluster.submit(steps=30, step_s=0.05, save_steps=4)
    cluster.wait_checkpoint(job)
    object_server.kill()
    try:
        ended = wait_for(
            lambda: [a for a in cluster.attempts(job) if a.ended_at], within_s=30, what="an end"
        )
        assert (ended[0].outcome, ended[0].cause) == ("lost", "store_unreachable")
        assert not ended[0].charged
        # Metrics went on while the store was away.
        assert (ended[0].number, 30) in cluster.steps(job)
    finally:
        object_server.start()
    assert cluster.finish(job) == "succeeded"
    attempts = cluster.attempts(job)
    assert {a.cause for a in attempts[:-1]} == {"store_unreachable"}
    last = [step for number, step in cluster.steps(job) if number == attempts[-1].number]
    assert min(last) > 4
