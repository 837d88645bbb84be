"""Commands about uploaded files."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tuneyard.cli.output import age, print_json, print_table, say, size
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.submitting import upload
from tuneyard.client import Client
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import is_id

SEARCHED = 2000
WHICH = "The file's id, or a name that one file has."

files = typer.Typer(help="Uploaded files.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(files, name="files")


@files.command("put")
def put_file(
    file: Annotated[Path, typer.Argument(help="A data set or a file of prompts.")],
    purpose: Annotated[
        Literal["dataset", "prompts"], typer.Option(help="What it is for.")
    ] = "dataset",
    json: Json = False,
) -> None:
    """Upload a file and check it.

    Example: tuneyard files put data.jsonl
    """
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no file"
        raise InputError(f"{file} is {what}.", code="no_file", hint="name a file")
    with connect() as client:
        found = client.file(upload(client, file, purpose=purpose))
    if json:
        print_json(found)
        return
    rows = (found.get("report") or {}).get("rows")
    say(f"{found['id']}  {found['name']}  {found['state']}  {rows} rows")


@files.command("list")
def list_files(json: Json = False) -> None:
    """List uploaded files.

    Example: tuneyard files list
    """
    with connect() as client:
        found = client.files()
    if json:
        print_json(found)
        return
    rows = [
        (f["id"], f["name"], f["purpose"], size(f["bytes"]), f["state"], age(f["created_at"]))
        for f in found
    ]
    print_table(("id", "name", "purpose", "size", "state", "age"), rows)


@files.command("show")
def show_file(file: Annotated[str, typer.Argument(help=WHICH)], json: Json = False) -> None:
    """Show a file and what its check found.

    Example: tuneyard files show file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        found = client.file(_find(client, file))
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['name']}  {size(found['bytes'])}  {found['state']}")
    say(f"  sha256 {found['sha256']}")
    report = found.get("report") or {}
    say(f"  {report.get('rows', '?')} rows of kind {report.get('rows_kind')}")
    for problem in report.get("problems", []):
        say(f"  {problem['message']}")
        if problem.get("hint"):
            say(f"    hint: {problem['hint']}")


@files.command("rm")
def remove_file(file: Annotated[str, typer.Argument(help=WHICH)], json: Json = False) -> None:
    """Delete a file.

    Example: tuneyard files rm file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    with connect() as client:
        file_id = _find(client, file)
        found = client.remove_file(file_id)
    if json:
        print_json(found)
    else:
        say(f"{file_id} deleted")


def _find(client: Client, file: str) -> str:
    """A file's id, from itself or from a name that one file has. Raises: InputError."""
    if is_id("file", file):
        return file
    named = [each["id"] for each in client.files(limit=SEARCHED) if each["name"] == file]
    if len(named) == 1:
        return str(named[0])
    many = "Several files are" if named else "No file is"
    hint = "`tuneyard files list` has ids"
    raise InputError(f"{many} called {file[:80]!r}.", code="bad_id", hint=hint)
