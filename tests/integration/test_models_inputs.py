"""What a spec names stays what it was when the job was submitted, within the job's own team."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from support.databases import TestDatabase

from tuneyard.models import dependencies, files
from tuneyard.models.files import StoredFile
from tuneyard.models.jobs import Submission, cancel_job, retry_job, submit_job
from tuneyard.specs.errors import Conflict
from tuneyard.specs.ids import new_id
from tuneyard.specs.jobs import read_spec


def submit(db: TestDatabase, team: UUID, **document: Any) -> UUID:
    spec, _ = read_spec({"kind": "inference", "model": "tiny"} | document)
    submission = Submission(spec)
    with db.api.begin(team=team) as tx:
        submit_job(tx, team, submission)
    return submission.id


def upload(db: TestDatabase, team: UUID, name: str, *, checked: bool = True) -> UUID:
    with db.api.begin(team=team) as tx:
        file = StoredFile(new_id(), name, "prompts", 1, "ab" * 32)
        files.add_file(tx, team, file)
    if checked:
        check(db, file.id)
    return file.id


def check(db: TestDatabase, file: UUID) -> None:
    db.run("UPDATE files SET state = 'processed', report = '{}' WHERE id = :id", id=file)


def decide(db: TestDatabase) -> None:
    """Look at blocked jobs as the scheduler does, who sees all teams."""
    with db.scheduler.begin() as tx:
        decided = dependencies.decided_jobs(tx)
    for job in decided:
        with db.scheduler.begin() as tx:
            dependencies.reconsider(tx, job)


def job_row(db: TestDatabase, job: UUID) -> Any:
    return db.rows("SELECT * FROM jobs WHERE id = :id", id=job)[0]


@pytest.fixture
def team(db: TestDatabase, a_team: Callable[[], UUID]) -> UUID:
    db.run(
        "INSERT INTO base_models (id, name, source, revision, digest, bytes, manifest)"
        " VALUES (gen_random_uuid(), 'tiny', 'here', '1', repeat('ab', 32), 1, '{}')"
    )
    return a_team()


def test_a_file_that_is_uploaded_later_under_the_same_name_is_not_taken(
    db: TestDatabase, team: UUID
) -> None:
    mine = upload(db, team, "p.jsonl", checked=False)
    job = submit(db, team, prompts="p.jsonl")
    upload(db, team, "p.jsonl")
    check(db, mine)
    decide(db)
    row = job_row(db, job)
    assert (row.state, row.inputs["prompts"]) == ("queued", {"file": str(mine)})


def test_another_teams_file_of_the_same_name_is_not_taken(
    db: TestDatabase, team: UUID, a_team: Callable[[], UUID]
) -> None:
    mine = upload(db, team, "p.jsonl", checked=False)
    job = submit(db, team, prompts="p.jsonl")
    theirs = upload(db, a_team(), "p.jsonl")
    check(db, mine)
    decide(db)
    assert str(theirs) not in str(job_row(db, job).inputs)
    assert job_row(db, job).state == "queued"


def test_a_job_whose_file_is_rejected_fails_with_the_reason(db: TestDatabase, team: UUID) -> None:
    file = upload(db, team, "p.jsonl", checked=False)
    job = submit(db, team, prompts="p.jsonl")
    db.run(
        "UPDATE files SET state = 'rejected', report = CAST(:report AS jsonb) WHERE id = :id",
        id=file,
        report='{"problems": [{"message": "line 3 is no JSON", "line": 3}]}',
    )
    decide(db)
    row = job_row(db, job)
    assert (row.state, row.error["code"], row.error["line"]) == ("failed", "bad_data", 3)


def test_a_job_that_still_waits_is_left_alone(db: TestDatabase, team: UUID) -> None:
    upload(db, team, "p.jsonl", checked=False)
    submit(db, team, prompts="p.jsonl")
    with db.scheduler.begin() as tx:
        assert dependencies.decided_jobs(tx) == []


@pytest.mark.parametrize("field", ["dataset", "eval_dataset"])
def test_no_file_of_an_open_job_can_be_deleted(db: TestDatabase, team: UUID, field: str) -> None:
    file, other = upload(db, team, "a.jsonl"), upload(db, team, "b.jsonl")
    names = {"dataset": "b.jsonl", "eval_dataset": "b.jsonl"} | {field: "a.jsonl"}
    job = submit(db, team, kind="finetune", **names)
    for each in (file, other):
        with pytest.raises(Conflict), db.api.begin(team=team) as tx:
            files.delete_file(tx, each)
    with db.api.begin(team=team) as tx:
        cancel_job(tx, job)
        files.delete_file(tx, file)


def test_a_retry_takes_the_same_file_though_a_newer_one_bears_its_name(
    db: TestDatabase, team: UUID
) -> None:
    first = upload(db, team, "p.jsonl")
    job = submit(db, team, prompts="p.jsonl")
    second = upload(db, team, "p.jsonl")
    taken = []
    for patch in ({}, {"temperature": 0.5}, {"prompts": "p.jsonl"}):
        with db.api.begin(team=team) as tx:
            cancel_job(tx, job)
            again = retry_job(tx, job, patch)
            submit_job(tx, team, again)
        job = again.id
        taken.append(job_row(db, job).inputs["prompts"]["file"])
    assert taken == [str(first), str(first), str(second)]
