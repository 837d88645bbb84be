"""Commands about files, models and nodes."""

from pathlib import Path
from typing import Annotated

import typer

from tuneyard.cli.output import age, print_json, print_table, say, size
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.submitting import upload
from tuneyard.specs.errors import InputError

files = typer.Typer(help="Uploaded files.", no_args_is_help=True, rich_markup_mode=None)
models = typer.Typer(help="Base and tuned models.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(files, name="files")
    app.add_typer(models, name="models")
    app.command()(nodes)


@files.command("put")
def put_file(
    file: Annotated[Path, typer.Argument(help="A data set or a file of prompts.")],
    purpose: Annotated[str, typer.Option(help="dataset or prompts.")] = "dataset",
    json: Json = False,
) -> None:
    """Upload a file and check it.

    Example: tuneyard files put data.jsonl
    """
    if not file.is_file():
        raise InputError(f"{file} is no file.", code="no_file")
    client = connect()
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
    found = connect().files()
    if json:
        print_json(found)
        return
    rows = [
        (f["id"], f["name"], f["purpose"], size(f["bytes"]), f["state"], age(f["created_at"]))
        for f in found
    ]
    print_table(("id", "name", "purpose", "size", "state", "age"), rows)


@files.command("show")
def show_file(
    file: Annotated[str, typer.Argument(help="The file's id.")], json: Json = False
) -> None:
    """Show a file and what its check found.

    Example: tuneyard files show file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    found = connect().file(file)
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['name']}  {size(found['bytes'])}  {found['state']}")
    say(f"  sha256 {found['sha256']}")
    report = found.get("report") or {}
    say(f"  {report.get('rows', '?')} rows of kind {report.get('rows_kind')}")
    for problem in report.get("problems", []):
        say(f"  {problem['message']}")


@files.command("rm")
def remove_file(
    file: Annotated[str, typer.Argument(help="The file's id.")], json: Json = False
) -> None:
    """Delete a file.

    Example: tuneyard files rm file_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b
    """
    found = connect().remove_file(file)
    if json:
        print_json(found)
    else:
        say(f"{file} deleted")


@models.command("list")
def list_models(json: Json = False) -> None:
    """List base models and your tuned ones.

    Example: tuneyard models list
    """
    found = connect().models()
    if json:
        print_json(found)
        return
    rows = [
        (m["name"], m["kind"], m.get("base_model") or "-", size(m["bytes"]), age(m["created_at"]))
        for m in found
    ]
    print_table(("name", "kind", "base", "size", "age"), rows)


@models.command("show")
def show_model(
    model: Annotated[str, typer.Argument(help="The model's name or id.")], json: Json = False
) -> None:
    """Show a model and its files.

    Example: tuneyard models show tuny
    """
    client = connect()
    found = client.model(model)
    if found.get("job") and found.get("artifact"):
        found["files"] = client.artifact_files(found["job"], found["artifact"])
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['name']}  {found['kind']}  {size(found['bytes'])}")
    if found.get("base_model"):
        say(f"  over {found['base_model']}, by {found['job']}")
    for entry in found.get("files", []):
        say(f"  {entry['path']}  {size(entry['size'])}  sha256 {entry['sha256']}")


def nodes(json: Json = False) -> None:
    """List nodes with their devices.

    Example: tuneyard nodes
    """
    found = connect().nodes()
    if json:
        print_json(found)
        return
    rows = [
        (n["name"], n["state"], d["kind"], d["uuid"], size(d["bytes"]), d["state"],
         f"{sum(s['busy'] for s in d['slots'])}/{len(d['slots'])} busy")
        for n in found
        for d in n["devices"]
    ]  # fmt: skip
    print_table(("node", "state", "kind", "device", "memory", "device state", "slots"), rows)
