"""`tuneyard infer`: prompts in, answers out, by an inference job."""

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from tuneyard.cli.jobs import Set
from tuneyard.cli.output import print_json, say
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.reading import read_small, unwritable
from tuneyard.cli.submitting import check_alone, submit_document
from tuneyard.cli.watching import await_end, report_failure, watch_job
from tuneyard.client import Client
from tuneyard.specs.documents import apply_overrides, read_json
from tuneyard.specs.errors import InputError
from tuneyard.specs.states import JobState

RESULTS = "results.jsonl"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(infer)


def infer(
    model: Annotated[str, typer.Argument(help="A base or a tuned model: name or id.")],
    prompts: Annotated[
        str, typer.Option(help="A file: JSON lines, or one prompt a line; - reads stdin.")
    ],
    adapter: Annotated[str | None, typer.Option(help="A tuned model over that base.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write the results to this file.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="An answer's length.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: the likeliest.")] = None,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Answer prompts by a model, and print the answers.

    Example: tuneyard infer tuny --prompts examples/questions.txt
    """
    options = {
        "adapter": adapter,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "system": system,
    }
    document: dict[str, Any] = {"kind": "inference", "model": model, "prompts": prompts}
    document |= {name: value for name, value in options.items() if value is not None}
    document = apply_overrides(document, set_ or [])
    if prompts == "-":
        document["prompts"] = _prompts_of(read_small("-", hint="give a file"))
    if output is not None:
        _check_writable(output)
    check_alone(document, Path.cwd())
    with connect() as client:
        job = submit_document(client, document, Path.cwd())["id"]
        return _follow(client, job, output, as_json=json)


def _follow(client: Client, job: str, output: Path | None, *, as_json: bool) -> int:
    if as_json:
        return _await_quietly(client, job, output)
    if code := watch_job(client, job):
        return code
    if output is None:
        return _print_results(client, job)
    _write_results(client, job, output)
    say(f"{output} written by {job}")
    return 0


def _await_quietly(client: Client, job: str, output: Path | None) -> int:
    """For programs: nothing on stdout but one document at the end."""
    ended = await_end(client, job)
    if ended["state"] != JobState.SUCCEEDED:
        print_json({"job": job, "state": ended["state"], "error": ended.get("error")})
        report_failure(ended)
        return 1
    if output is not None:
        _write_results(client, job, output)
    print_json({"job": job, "results": _results(client, job)})
    return 0


def _prompts_of(content: bytes) -> list[Any]:
    """One prompt a line, or JSON lines where the first is an object. Raises: InputError."""
    try:
        lines = [line for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise InputError("stdin is not UTF-8.", code="wrong_format", field="prompts") from None
    if not lines[0].lstrip().startswith("{"):
        return [line.rstrip("\r") for line in lines]
    return [_row(number, line) for number, line in enumerate(lines, 1)]


def _row(number: int, line: str) -> Any:
    try:
        row = read_json(line)
    except InputError as error:
        error.message, error.line = f"stdin: {error.message}", number
        raise
    return row.get("prompt", row)


def _check_writable(output: Path) -> None:
    """Before anything is computed. Raises: InputError."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        what = "is a folder" if output.is_dir() else "lies in no folder that exists"
        message = f"{output} {what}."
        raise InputError(message, code="not_writable", field="out", hint="name a file")


def _entry(client: Client, job: str) -> tuple[str, Mapping[str, Any]]:
    artifact = next(a["id"] for a in client.artifacts(job) if a["kind"] == "results")
    files = client.artifact_files(job, artifact)
    return artifact, next(entry for entry in files if entry["path"] == RESULTS)


def _write_results(client: Client, job: str, output: Path) -> None:
    artifact, entry = _entry(client, job)
    try:
        client.fetch_artifact_file(job, artifact, entry, output)
    except OSError as error:
        raise unwritable(output, error) from None


def _results(client: Client, job: str) -> list[dict[str, Any]]:
    with TemporaryDirectory(prefix="tuneyard-") as folder:
        path = Path(folder, RESULTS)
        artifact, entry = _entry(client, job)
        client.fetch_artifact_file(job, artifact, entry, path)
        with path.open(encoding="utf-8", newline="\n") as lines:
            return [json_format.loads(line) for line in lines if line.strip()]


def _print_results(client: Client, job: str) -> int:
    for row in _results(client, job):
        say(f"{row['index'] + 1}. {row['text'].strip()}")
    return 0
