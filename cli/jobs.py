"""Commands about jobs."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.cli.output import age, out, print_json, print_table, say
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.submitting import local_file, read_document, upload, upload_inputs
from tuneyard.cli.watching import report_end, watch_job
from tuneyard.client import Client
from tuneyard.specs.documents import apply_overrides
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import is_id
from tuneyard.specs.jobs import read_spec

Job = Annotated[str, typer.Argument(help="The job's id, or its name if only one has it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value over the document.")]
PLACEHOLDER = "file_" + "0" * 32


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, show, watch, logs, cancel, retry, infer, artifacts, download):
        app.command()(command)
    app.command("list")(list_jobs)


def submit(
    file: Annotated[str, typer.Argument(help="A YAML or JSON file; - reads stdin.")],
    wait: Annotated[bool, typer.Option(help="Watch it to its end.")] = False,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Submit a job. Files that it names beside itself are uploaded.

    Example: tuneyard submit examples/identity_lora.yaml --set lora_rank=8 --wait
    """
    document = read_document(file, set_ or [])
    base = Path(file).parent if file != "-" else Path.cwd()
    _check_before_uploading(document, base)
    client = connect()
    job = client.submit(upload_inputs(client, document, base))
    if json and not wait:
        print_json(job)
        return 0
    if not json:
        say(f"{job['id']}  {job['name']}  {job['state']}")
        for note in job.get("notes") or []:
            say(f"  note: {note['message']}")
        if not wait:
            say(f"  next: tuneyard watch {job['id']}")
    return watch_job(client, job["id"], as_json=json) if wait else 0


def _check_before_uploading(document: dict[str, Any], base: Path) -> None:
    """Refuse what is wrong by itself before anything travels. Raises: SpecRejected."""
    stand_in = {
        field: PLACEHOLDER
        for field in ("dataset", "eval_dataset", "prompts")
        if isinstance(document.get(field), str) and local_file(document[field], base)
    }
    read_spec(document | stand_in)


def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: tuneyard list --state running
    """
    found = connect().jobs(state=state, kind=kind, limit=limit)
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
    """A job's id, from itself or from a name that one job has."""
    if is_id("job", job):
        return job
    named = [found["id"] for found in client.jobs(name=job, limit=2)]
    if len(named) == 1:
        return str(named[0])
    many = "several jobs are" if named else "no job is"
    raise InputError(f"{many} called {job[:80]!r}.", code="bad_id", hint="`tuneyard list` has ids")


def show(job: Job, json: Json = False) -> None:
    """Show a job: its state, attempts, inputs and result.

    Example: tuneyard show job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    client = connect()
    found = client.job(find(client, job))
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['kind']}  {found['name']}")
    say(f"  {found['state']}  {_progress(found)}  submitted {age(found['created_at'])} ago")
    if found.get("wait_reason"):
        say(f"  {found['wait_reason']}")
    for attempt in found["attempts"]:
        where = f"{attempt.get('node')} {', '.join(attempt.get('devices') or [])}"
        end = attempt.get("outcome") or attempt["phase"]
        cause = f" ({attempt['cause']})" if attempt.get("cause") else ""
        say(f"  attempt {attempt['number']} on {where}: {end}{cause}")
    if found["state"] in ("succeeded", "failed", "cancelled"):
        report_end(client, found["id"])


def watch(job: Job, json: Json = False) -> int:
    """Watch a job to its end; Ctrl-C leaves the job alone.

    Example: tuneyard watch job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    client = connect()
    return watch_job(client, find(client, job), as_json=json)


def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(help="Only the last lines.", min=0)] = None,
    json: Json = False,
) -> None:
    """Print a job's log.

    Example: tuneyard logs -f job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    client = connect()
    pieces = client.logs(find(client, job), follow=follow, tail=tail)
    if json:
        print_json({"log": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def cancel(job: Job, json: Json = False) -> None:
    """Cancel a job; a running one saves a checkpoint first.

    Example: tuneyard cancel job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    client = connect()
    found = client.cancel(find(client, job))
    if json:
        print_json(found)
    else:
        say(f"{found['id']}  {found['state']}")


def retry(
    job: Job,
    set_: Set = None,
    from_scratch: Annotated[bool, typer.Option(help="Not from its newest checkpoint.")] = False,
    json: Json = False,
) -> None:
    """Try an ended job again, as a new job.

    Example: tuneyard retry job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b --set cutoff_len=1024
    """
    client = connect()
    patch = apply_overrides({}, set_ or [])
    found = client.retry(find(client, job), patch=patch, from_scratch=from_scratch)
    if json:
        print_json(found)
    else:
        say(f"{found['id']}  {found['name']}  {found['state']}")


def infer(
    model: Annotated[str, typer.Argument(help="A base or a tuned model: name or id.")],
    prompts: Annotated[str, typer.Option(help="A file: JSON lines, or one prompt a line.")],
    adapter: Annotated[str | None, typer.Option(help="A tuned model over that base.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write the results to this file.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    json: Json = False,
) -> int:
    """Answer prompts by a model, and print the answers.

    Example: tuneyard infer tuny --prompts examples/questions.txt
    """
    client = connect()
    path = local_file(prompts, Path.cwd())
    asked = {
        "kind": "inference",
        "model": model,
        "adapter": adapter,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "system": system,
    }
    document = {name: value for name, value in asked.items() if value is not None}
    read_spec(document | {"prompts": PLACEHOLDER})
    document["prompts"] = upload(client, path, purpose="prompts") if path else prompts
    job = client.submit(document)
    for _ in client.watch(job["id"]) if json or output else ():
        pass
    code = report_end(client, job["id"]) if json or output else watch_job(client, job["id"])
    if code:
        return code
    return _print_results(client, job["id"], output, as_json=json)


def _print_results(client: Client, job: str, output: Path | None, *, as_json: bool) -> int:
    artifact = next(a for a in client.artifacts(job) if a["kind"] == "results")
    content = client.read_artifact_file(job, artifact["id"], "results.jsonl")
    if output is not None:
        output.write_bytes(content)
    rows = [json_format.loads(line) for line in content.decode().split("\n") if line]
    if as_json:
        print_json({"job": job, "results": rows})
    elif output is None:
        for row in rows:
            out.print(f"[dim]{row['index'] + 1}.[/dim]", end=" ")
            say(row["text"].strip())
    return 0


def artifacts(job: Job, json: Json = False) -> None:
    """List what a job brought forth.

    Example: tuneyard artifacts job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    client = connect()
    found = client.artifacts(find(client, job))
    if json:
        print_json(found)
        return
    rows = [(a["id"], a["kind"], a.get("step") or "-", a["bytes"], a["digest"][:16]) for a in found]
    print_table(("id", "kind", "step", "bytes", "digest"), rows)


def download(
    job: Job,
    output: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path(),
    json: Json = False,
) -> None:
    """Fetch a job's result, each file checked against its sha256.

    Example: tuneyard download job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b --out ./tuny
    """
    client = connect()
    job = find(client, job)
    fetched: list[str] = []
    for artifact in client.artifacts(job):
        if artifact["kind"] != "checkpoint":
            fetched += map(str, client.fetch_artifact(job, artifact["id"], output))
    if json:
        print_json(fetched)
    for path in fetched if not json else []:
        say(path)
