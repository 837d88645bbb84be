"""A worker's supervisor and keepers in this process, on real PostgreSQL; the runner hashes."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from support.clusters import FAKE_RUNNER, Cluster
from support.databases import TestDatabase
from support.yards import wait_for

from tuneyard.models.attempts import AttemptRef
from tuneyard.models.jobs import Submission, submit_job
from tuneyard.models.nodes import NodeTaken
from tuneyard.specs.ids import new_id
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.settings import Settings
from tuneyard.store.folder import manifest_digest, publish_folder
from tuneyard.workers import keeping
from tuneyard.workers import supervisor as supervising
from tuneyard.workers.guarding import kill_marked
from tuneyard.workers.staging import remove_work
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


def run_to_end(cluster: Cluster, supervisor: Supervisor, job: UUID) -> Any:
    """Place a job and keep its attempt to the end; the attempt's row."""
    ref = cluster.place(job)
    supervisor.look()
    keeper = supervisor.keeper_of(ref.id)
    assert keeper is not None
    assert keeper.done.wait(30)
    return cluster.attempts(job)[-1]


def a_model_in_the_store(db: TestDatabase, supervisor: Supervisor) -> Path:
    """A recorded base model; where its folder stands."""
    model, made = new_id(), supervisor.node.settings.home / "made"
    (made / ".aside").mkdir(parents=True)
    (made / ".aside" / "weights").write_bytes(b"weights")
    publish_folder(made / ".aside", made / "model", {})
    manifest = supervisor.node.store.put_folder(made / "model", "models", model)
    db.run(
        "INSERT INTO base_models (id, name, source, revision, digest, bytes, manifest)"
        " VALUES (:id, 'tiny', 'here', '1', :digest, 1, '{}')",
        id=model,
        digest=manifest_digest(manifest),
    )
    return supervisor.node.settings.home / "store" / "models" / model.hex


def ask_model(cluster: Cluster) -> UUID:
    """An inference job of the model; its runner is the hashing one all the same."""
    spec, _ = read_spec({"kind": "inference", "model": "tiny", "prompts": ["?"], "device": "cpu"})
    submission = Submission(spec)
    with cluster.db.api.begin(team=cluster.team) as tx:
        submit_job(tx, cluster.team, submission)
    return submission.id


def test_inputs_cannot_be_written(
    db: TestDatabase,
    cluster: Cluster,
    a_supervisor: Callable[..., Supervisor],
    tmp_path: Path,
) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    supervisor = a_supervisor(runner_python=str(failing))
    a_model_in_the_store(db, supervisor)
    attempt = run_to_end(cluster, supervisor, ask_model(cluster))
    assert attempt.outcome == "failed"  # the folder of a failed attempt is kept
    inputs = supervisor.node.settings.home / "work" / f"attempt_{attempt.id.hex}" / "inputs"
    modes = [path.stat().st_mode & 0o222 for path in (inputs, inputs / "model" / "weights")]
    assert modes == [0, 0]
    remove_work(inputs.parent)
    assert not inputs.parent.exists()


def test_an_input_that_is_damaged_in_the_store_is_gone_and_says_so(
    db: TestDatabase, cluster: Cluster, a_supervisor: Callable[..., Supervisor]
) -> None:
    supervisor = a_supervisor()
    (a_model_in_the_store(db, supervisor) / "weights").write_bytes(b"weightz")
    maker = cluster.submit()  # as if a system job had made it
    assert run_to_end(cluster, supervisor, maker).outcome == "succeeded"
    db.run("UPDATE jobs SET system = true, work_key = 'work' WHERE id = :id", id=maker)
    db.run(
        "INSERT INTO artifacts (id, team_id, job_id, attempt_id, token, kind, bytes, digest,"
        " manifest) SELECT m.id, a.team_id, a.job_id, a.id, a.token, 'tokens', 1, m.digest, '{}'"
        " FROM base_models m, attempts a WHERE m.name = 'tiny'"
    )
    job = ask_model(cluster)
    attempt = run_to_end(cluster, supervisor, job)
    assert (attempt.outcome, attempt.cause) == ("failed", "input_gone")
    assert cluster.job(maker).work_key is None  # whoever wants it next has it made anew
    assert attempt.evidence == ("model tiny is damaged in the store: weights has changed.")
    assert cluster.job(job).state == "failed"


def test_a_cache_that_is_too_large_shrinks_once_nothing_pins_it(
    a_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = a_supervisor(cache_max_bytes=1)
    entry = supervisor.node.cache / ("a" * 64)
    entry.mkdir()
    (entry / "weights").write_bytes(b"weights")
    monkeypatch.setattr(supervisor, "_pinned", lambda: {entry.name})
    supervisor.keep_cache()
    assert entry.exists()
    monkeypatch.setattr(supervisor, "_pinned", set)
    supervisor.keep_cache()
    assert not entry.exists()


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EIO, "store_unreachable"),
        (errno.ESTALE, "store_unreachable"),
    ],
)
def test_a_failure_of_staging_is_called_by_its_name_and_not_charged(
    cluster: Cluster,
    a_supervisor: Callable[..., Supervisor],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    cause: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    supervisor = a_supervisor()
    monkeypatch.setattr(keeping, "stage", fail)
    attempt = run_to_end(cluster, supervisor, cluster.submit())
    assert (attempt.outcome, attempt.cause, attempt.charged) == ("lost", cause, False)


def test_a_runner_that_says_done_without_a_whole_output_is_charged_with_a_bug(
    cluster: Cluster, a_supervisor: Callable[..., Supervisor]
) -> None:
    attempt = run_to_end(cluster, a_supervisor(), cluster.submit(no_output=True))
    assert (attempt.outcome, attempt.cause, attempt.charged) == ("failed", "bug", True)
    assert attempt.evidence == "The runner ended with 0 and left no whole output."


def test_a_second_worker_of_a_node_is_refused_until_the_first_was_silent_for_a_lease(
    db: TestDatabase, a_supervisor: Callable[..., Supervisor], tmp_path: Path
) -> None:
    first = a_supervisor()
    with pytest.raises(NodeTaken, match="Another worker serves the node n1") as refused:
        a_supervisor(home=tmp_path / "other")
    assert refused.value.field == "node_name"
    assert "TUNEYARD_NODE_NAME" in str(refused.value.hint)
    assert a_supervisor().node.id == first.node.id  # the same home: it was started again
    db.run("UPDATE nodes SET seen_at = seen_at - interval '61 s'")
    assert a_supervisor(home=tmp_path / "other").node.id == first.node.id


def test_a_worker_that_said_goodbye_leaves_its_name_to_another(
    a_supervisor: Callable[..., Supervisor], tmp_path: Path
) -> None:
    a_supervisor().shut_down(keep_runners=False)
    a_supervisor(home=tmp_path / "other")


def test_what_another_home_has_claimed_is_not_started_again(
    db: TestDatabase, cluster: Cluster, a_supervisor: Callable[..., Supervisor], tmp_path: Path
) -> None:
    first = a_supervisor()
    ref = cluster.place(cluster.submit())
    assert first._claim(ref)
    db.run("UPDATE nodes SET state = 'down'")
    other = a_supervisor(home=tmp_path / "other")
    other.look()
    assert other.keepers == {}
    db.run("UPDATE nodes SET state = 'down'")
    again = a_supervisor()  # the crash between claim and start: nothing of it can run
    again.look()
    assert set(again.keepers) == {ref.id}


def test_a_checkpoint_that_is_not_the_announced_one_is_rejected(
    db: TestDatabase, cluster: Cluster, a_supervisor: Callable[..., Supervisor]
) -> None:
    attempt = run_to_end(cluster, a_supervisor(), cluster.submit(steps=2, wrong_digest=True))
    assert attempt.outcome == "succeeded"
    assert db.rows("SELECT 1 FROM artifacts WHERE kind = 'checkpoint'") == []
    (said,) = db.rows("SELECT data FROM events WHERE type = 'checkpoint_rejected'")
    assert said.data["message"] == "its manifest is not the one that the runner announced"
