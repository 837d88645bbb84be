"""Commands about jobs."""

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.cli.exporting import export_folder, write_export
from tuneyard.cli.output import age, print_json, print_table, say
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.submitting import check_alone, read_document, submit_document
from tuneyard.cli.watching import (
    await_end,
    failure_lines,
    leaving_alone,
    report_end,
    said_lines,
    watch_job,
    watch_jobs,
)
from tuneyard.client import Client
from tuneyard.specs.documents import apply_overrides
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import is_id
from tuneyard.specs.jobs import KINDS
from tuneyard.specs.states import TERMINAL, JobState

Kind = StrEnum("Kind", {name: name for name in KINDS})  # type: ignore[misc]  # as KINDS grows

Job = Annotated[str, typer.Argument(help="The job's id, or its name if only one has it.")]
JobOrPipeline = Annotated[
    str, typer.Argument(help="The id of a job or pipeline, or the name of a job.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Over the document; may stand several times."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(submit)
    app.command("list")(list_jobs)
    for command in (show, watch, logs, cancel, retry):
        app.command()(command)


def submit(
    file: Annotated[str, typer.Argument(help="A YAML or JSON file; - reads stdin.")],
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Submit a job, or a pipeline of jobs. Files that they name beside themselves are uploaded.

    Example: tuneyard submit examples/identity_lora.yaml --set lora_rank=8 --wait
    """
    document = read_document(file, set_ or [])
    base = Path(file).parent if file != "-" else Path.cwd()
    check_alone(document, base)
    with connect() as client:
        return follow_submission(client, document, base, wait=wait, as_json=json)


def follow_submission(
    client: Client, document: dict[str, Any], base: Path, *, wait: bool, as_json: bool
) -> int:
    """Submit a checked document; with ``wait`` to its end, and merges into their export_dir."""
    if wait:
        for step in document.get("pipeline") or [document]:
            export_folder(step)  # one that cannot be written to is refused before anything travels
    made = submit_document(client, document, base)
    jobs = made.get("jobs") or [made | {"spec": document}]
    if as_json:
        return _follow_quietly(client, made, jobs, wait=wait)
    for job in jobs:
        say(f"{job['id']}  {job['name']}  {job['state']}")
        for note in job.get("notes") or []:
            say(f"  note: {note['message']}")
    if not wait:
        say(f"  next: tuneyard watch {made['id']}")
        return 0
    return watch_jobs(client, jobs, after=_export)


def _export(client: Client, job: Mapping[str, Any]) -> None:
    if folder := export_folder(job["spec"]):
        write_export(client, job["id"], folder)
        say(f"  written to {folder}")


def _follow_quietly(
    client: Client, made: dict[str, Any], jobs: Sequence[dict[str, Any]], *, wait: bool
) -> int:
    """For programs: nothing on stdout but one document at the end."""
    ended = [_ended(client, job) if wait else job for job in jobs]
    if "jobs" in made:
        print_json(made | {"jobs": ended})
    else:
        print_json(ended[0] if wait else made)
    return int(wait and not all(job["state"] == JobState.SUCCEEDED for job in ended))


def _ended(client: Client, job: Mapping[str, Any]) -> dict[str, Any]:
    """A job at its end; a merge that was to be exported is, and says where."""
    ended = await_end(client, job["id"])
    folder = export_folder(job["spec"])
    if folder is None or ended["state"] != JobState.SUCCEEDED:
        return ended
    write_export(client, job["id"], folder)
    return ended | {"export_dir": str(folder)}


def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only this state.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only this kind.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also those made for other jobs.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="This many at most.")] = 20,
    json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: tuneyard list --state running
    """
    with connect() as client:
        found = client.jobs(state=state, kind=kind, all_=all_, limit=limit)
    if json:
        print_json(found)
        return
    rows = [
        (j["id"], j["kind"], j["name"], j["state"], _progress(j), age(j["created_at"]),
         j.get("wait_reason") or "")
        for j in found
    ]  # fmt: skip
    print_table(("id", "kind", "name", "state", "progress", "age", "waits"), rows)


def _progress(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    return f"{progress['done']}/{progress['total']}" if progress.get("total") else "-"


def find(client: Client, job: str) -> str:
    """A job's id, from itself or from a name that one job has. Raises: InputError."""
    if is_id("job", job):
        return job
    named = client.jobs(name=job, limit=4) if job else []
    if len(named) == 1:
        return str(named[0]["id"])
    many = "several jobs are" if named else "no job is"
    newest = ", ".join(f"{each['id']} ({each['state']})" for each in named[:3])
    hint = f"the newest first: {newest}" if named else "`tuneyard list` has ids"
    raise InputError(f"{many} called {job[:80]!r}.", code="bad_id", hint=hint)


def show(job: JobOrPipeline, json: Json = False) -> None:
    """Show a job: its state, attempts, inputs and result.

    Example: tuneyard show job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        steps = is_id("pipeline", job)
        found = client.pipeline(job) if steps else client.job(find(client, job))
        if json:
            print_json(found)
            return
        for each in found["jobs"] if steps else [found]:
            _show_job(client, each)


def _show_job(client: Client, job: dict[str, Any]) -> None:
    for line in (*_summary(job), *said_lines(client, job)):
        say(line)
    if job["state"] == JobState.SUCCEEDED:
        report_end(client, job["id"])
    elif job["state"] in TERMINAL:
        for line in failure_lines(job):
            say(line)


def _summary(job: dict[str, Any]) -> list[str]:
    lines = [
        f"{job['id']}  {job['kind']}  {job['name']}",
        f"  {job['state']}  {_progress(job)}  submitted {age(job['created_at'])} ago",
    ]
    if job.get("retry_of"):
        lines.append(f"  a retry of {job['retry_of']}")
    if job.get("wait_reason"):
        lines.append(f"  waits: {job['wait_reason']}")
    if job.get("pipeline"):
        lines.append(f"  a step of {job['pipeline']}")
    lines += [f"  {field}: {name}" for field, name in (job.get("inputs") or {}).items()]
    lines += [f"  note: {note['message']}" for note in job.get("notes") or []]
    for attempt in job.get("attempts") or []:
        where = f"{attempt.get('node')} {', '.join(attempt.get('devices') or [])}".rstrip()
        end = attempt.get("outcome") or attempt["phase"]
        cause = f" ({attempt['cause']})" if attempt.get("cause") else ""
        lines.append(f"  attempt {attempt['number']} on {where}: {end}{cause}")
    return lines


def watch(job: JobOrPipeline, json: Json = False) -> int:
    """Watch a job to its end; Ctrl-C leaves the job alone.

    Example: tuneyard watch job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        if is_id("pipeline", job):
            return watch_jobs(client, client.pipeline(job)["jobs"], as_json=json)
        return watch_job(client, find(client, job), as_json=json)


def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(help="Only the last lines.", min=0)] = None,
    attempt: Annotated[int | None, typer.Option(help="Only this attempt's.", min=1)] = None,
    json: Json = False,
) -> None:
    """Print a job's log.

    Example: tuneyard logs -f job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        job = find(client, job)
        pieces = client.logs(job, follow=follow, tail=tail, attempt=attempt)
        if json:
            print_json({"log": "".join(pieces)})
            return
        with leaving_alone(job):
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()


def cancel(job: JobOrPipeline, json: Json = False) -> None:
    """Cancel a job, or all jobs of a pipeline; a running one saves a checkpoint first.

    Example: tuneyard cancel job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        steps = is_id("pipeline", job)
        found = client.cancel_pipeline(job) if steps else client.cancel(find(client, job))
    if json:
        print_json(found)
        return
    for each in found["jobs"] if steps else [found]:
        say(f"{each['id']}  {each['state']}")


def retry(
    job: Job,
    set_: Set = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Not from its newest checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Try an ended job again, as a new job.

    Example: tuneyard retry job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b --set cutoff_len=1024
    """
    patch = apply_overrides({}, set_ or [])
    with connect() as client:
        found = client.retry(find(client, job), patch=patch, from_scratch=from_scratch)
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['name']}  {found['state']}")
    say(f"  next: tuneyard watch {found['id']}")
