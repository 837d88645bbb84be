"""Commands about what jobs brought forth."""

from pathlib import Path
from typing import Annotated

import typer

from tuneyard.cli.jobs import Job, find
from tuneyard.cli.output import print_json, print_table, say
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.reading import unwritable
from tuneyard.client import Client
from tuneyard.specs.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(artifacts)
    app.command()(fetch)


def artifacts(job: Job, json: Json = False) -> None:
    """List what a job brought forth.

    Example: tuneyard artifacts job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        found = client.artifacts(find(client, job))
    if json:
        print_json(found)
        return
    rows = [(a["id"], a["kind"], a.get("step") or "-", a["bytes"], a["digest"][:16]) for a in found]
    print_table(("id", "kind", "step", "bytes", "digest"), rows)


def fetch(
    job: Job,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; unset: one named as the job.")
    ] = None,
    json: Json = False,
) -> None:
    """Fetch a job's result, each file checked against its sha256.

    Example: tuneyard fetch job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b --out ./tuny
    """
    with connect() as client:
        job = find(client, job)
        folder = output or Path(job)
        try:
            fetched = _fetch_results(client, job, folder)
        except OSError as error:
            raise unwritable(folder, error) from None
    if json:
        print_json([str(path) for path in fetched])
        return
    for path in fetched:
        say(str(path))


def _fetch_results(client: Client, job: str, folder: Path) -> list[Path]:
    """All results, no checkpoints and logs; several go into a folder each, by kind.

    What trackers wrote lies in folders of its own already, such as runs/ and wandb/.
    """
    found = [each for each in client.artifacts(job) if each["kind"] not in ("checkpoint", "log")]
    if not found:
        hint = f"`tuneyard watch {job}` waits for it"
        raise InputError(f"{job} has no result.", code="no_result", hint=hint)
    several = len([each for each in found if each["kind"] != "reports"]) > 1
    return [
        path
        for each in found
        for path in client.fetch_artifact(
            job,
            each["id"],
            folder / each["kind"] if several and each["kind"] != "reports" else folder,
        )
    ]
