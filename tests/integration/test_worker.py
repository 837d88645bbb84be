"""Real worker and scheduler processes on real PostgreSQL and Valkey; the runner hashes."""

import gzip
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.clusters import Cluster
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.yards import wait_for

from tuneyard.local.valkey import RunningValkey
from tuneyard.workers.guarding import marked_attempts


@pytest.fixture
def a_cluster(
    db: TestDatabase, valkey: RunningValkey, tmp_path: Path
) -> Iterator[Callable[..., Cluster]]:
    """Make a running cluster; afterwards nothing of it is left and no invariant is broken."""
    made: list[Cluster] = []

    def make(**settings: object) -> Cluster:
        home = tmp_path / "home"
        home.mkdir()
        cluster = Cluster(db, home, valkey.url, settings)
        made.append(cluster)
        cluster.start("scheduler")
        cluster.start("worker")
        return cluster

    yield make
    for cluster in made:
        cluster.stop()
        ours = {f"attempt_{row.id.hex}" for row in db.rows("SELECT id FROM attempts")}
        assert ours & set(marked_attempts()) == set()
    assert broken_invariants(db) == {}


def test_a_job_runs_to_its_end_and_its_output_is_recorded(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=5)
    assert cluster.finish(job) == "succeeded"
    assert [step for _, step in cluster.steps(job)] == [1, 2, 3, 4, 5]
    assert cluster.db.rows("SELECT name FROM base_models")[0].name.startswith("m-")
    archived = "SELECT x.id FROM attempts a JOIN artifacts x ON x.id = a.log_artifact"
    (log,) = wait_for(lambda: cluster.db.rows(archived), within_s=10, what="the log's archive")
    packed = cluster.home / "store" / "artifacts" / log.id.hex / "log.gz"
    assert gzip.decompress(packed.read_bytes()).splitlines()[-1] == b"step 5"
    assert cluster.db.rows("SELECT 1 FROM log_chunks") == []


def test_jobs_run_without_any_broker(a_cluster: Callable[..., Cluster]) -> None:
    cluster = a_cluster(broker_url="redis://127.0.0.1:1/0")
    assert cluster.finish(cluster.submit()) == "succeeded"


def test_two_jobs_on_two_gpus_run_at_once_and_a_third_waits_and_says_why(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster(fake_gpus=2)
    jobs = [cluster.submit(steps=40, step_s=0.1, device="gpu") for _ in range(2)]
    for job in jobs:
        cluster.wait_state(job, "running")
    third = cluster.submit(steps=2, device="gpu")
    reason = wait_for(
        lambda: cluster.job(third).wait_reason, within_s=10, what="a reason for waiting"
    )
    assert reason == "waits for 1 GPU: 2 of 2 busy"
    for job in (*jobs, third):
        assert cluster.finish(job) == "succeeded"
    taken = {line["attempt"]: line["gpu"] for line in cluster.diary() if line["event"] == "take"}
    first, second = (f"attempt_{cluster.attempts(job)[0].id.hex}" for job in jobs)
    assert taken[first] != taken[second]


def test_cancel_reaches_every_descendant(a_cluster: Callable[..., Cluster]) -> None:
    cluster = a_cluster(stop_grace_s=1)
    job = cluster.submit(steps=10_000, leak_child=True, ignore_term=True)
    cluster.wait_state(job, "running")
    cluster.cancel(job)
    assert cluster.finish(job) == "cancelled"
    assert f"attempt_{cluster.attempts(job)[0].id.hex}" not in marked_attempts()


def test_a_cancel_before_the_claim_ends_without_a_runner(a_cluster: Callable[..., Cluster]) -> None:
    cluster = a_cluster()
    cluster.finish(cluster.submit(steps=1))
    cluster.kill("worker")
    job = cluster.submit()
    cluster.wait_state(job, "dispatched")
    cluster.cancel(job)
    cluster.start("worker")
    assert cluster.finish(job) == "cancelled"
    assert cluster.steps(job) == []


def test_a_killed_worker_finds_its_runner_again(a_cluster: Callable[..., Cluster]) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=60, step_s=0.05)
    cluster.wait_checkpoint(job)
    before = cluster.guard_file(job)
    cluster.kill("worker")
    cluster.start("worker", disk_floor_bytes=0)
    assert cluster.finish(job) == "succeeded"
    assert len(cluster.attempts(job)) == 1
    assert [step for _, step in cluster.steps(job)] == list(range(1, 61))
    assert before["runner_pid"]


@pytest.mark.parametrize(("victim", "cause"), [("pid", "guard_lost"), ("runner_pid", "killed")])
def test_a_killed_guard_or_runner_costs_no_more_than_the_steps_since_the_checkpoint(
    a_cluster: Callable[..., Cluster], victim: str, cause: str
) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=60, step_s=0.05, save_steps=5)
    cluster.wait_checkpoint(job)
    os.kill(cluster.guard_file(job)[victim], signal.SIGKILL)
    assert cluster.finish(job) == "succeeded"
    first, second = cluster.attempts(job)
    assert (first.outcome, first.cause, first.charged) == ("lost", cause, False)
    steps = cluster.steps(job)
    resumed_at = min(step for number, step in steps if number == second.number)
    last = max(step for number, step in steps if number == first.number)
    assert resumed_at > 1
    assert last - resumed_at < 10  # shipped each second, recorded a moment later


def test_a_worker_that_is_told_to_stop_while_it_starts_stops(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster()
    wait_for(lambda: cluster.count_in_log("worker ready"), within_s=20, what="a worker")
    for moment in ("worker ready", "[queues]", "Connected to", "n1 ready"):
        cluster.kill("worker")
        said = cluster.count_in_log(moment)
        process = cluster.start("worker")
        wait_for(
            lambda moment=moment, said=said: cluster.count_in_log(moment) > said,
            within_s=20,
            what=moment,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, moment


def test_a_runner_that_falls_silent_is_ended_and_the_job_tried_again(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster(stall_s=3)
    job = cluster.submit(steps=60, step_s=0.05)
    cluster.wait_checkpoint(job)
    os.kill(cluster.guard_file(job)["runner_pid"], signal.SIGSTOP)
    assert cluster.finish(job) == "succeeded"
    first, _ = cluster.attempts(job)
    assert (first.outcome, first.cause, first.charged) == ("lost", "stalled", False)
    assert first.evidence == "the runner wrote nothing for 3 s"


def test_a_worker_that_is_told_to_stop_stops_its_runner_at_a_checkpoint(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=100, step_s=0.05)
    cluster.wait_state(job, "running")
    cluster.kill("worker", signal.SIGTERM)
    cluster.wait_state(job, "queued")
    assert cluster.attempts(job)[0].stop_reason == "shutdown"
    cluster.start("worker", disk_floor_bytes=0)
    assert cluster.finish(job) == "succeeded"


def test_a_node_that_vanishes_loses_its_lease_and_the_job_goes_on_elsewhere_later(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster(lease_s=2, fake_gpus=1)
    job = cluster.submit(steps=60, step_s=0.05, device="gpu")
    cluster.wait_checkpoint(job)
    guard = cluster.guard_file(job)
    cluster.kill("worker")
    wait_for(
        lambda: cluster.attempts(job)[0].ended_at, within_s=20, what="the end of the first attempt"
    )
    assert not Path(f"/proc/{guard['runner_pid']}").exists()
    assert [r.state for r in cluster.db.rows("SELECT state FROM devices WHERE kind = 'gpu'")] == [
        "unconfirmed"
    ]
    cluster.start("worker", disk_floor_bytes=0)
    assert cluster.finish(job) == "succeeded"
    assert cluster.attempts(job)[0].cause == "node_lost"


def test_a_failing_job_is_tried_three_times_and_says_why(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster()
    job = cluster.submit(exit=70)
    assert cluster.finish(job) == "failed"
    assert [a.cause for a in cluster.attempts(job)] == ["bug"] * 3
    assert cluster.job(job).error == {
        "code": "bug",
        "message": "asked to fail",
        "patch": {"steps": 1},
    }


def test_what_a_runner_wrote_last_is_shipped_though_the_database_is_away_at_its_end(
    a_cluster: Callable[..., Cluster],
) -> None:
    cluster = a_cluster()
    job = cluster.submit(steps=40, step_s=0.05)
    exit_file = cluster.workdir(job) / "exit.json"
    cluster.guard_file(job)
    with cluster.db.away():
        wait_for(exit_file.exists, within_s=20, what="the runner's end")
        said = cluster.count_in_log("leases not renewed")
        wait_for(
            lambda: cluster.count_in_log("leases not renewed") > said,
            within_s=20,
            what="a renewal that failed after the runner's end",
        )
    assert cluster.finish(job) == "succeeded"
    assert cluster.steps(job) == [(1, step) for step in range(1, 41)]
    log = b"".join(row.data for row in cluster.db.rows("SELECT data FROM log_chunks ORDER BY seq"))
    assert log.splitlines()[-1] == b"step 40"


def test_only_one_worker_serves_a_home(a_cluster: Callable[..., Cluster]) -> None:
    cluster = a_cluster()
    cluster.finish(cluster.submit())
    second = Cluster(cluster.db, cluster.home, cluster.broker_url, cluster.settings)
    process: subprocess.Popen[bytes] = second.start("worker")
    assert process.wait(20) != 0
    assert "Another worker serves" in (cluster.home / "worker.log").read_text()
