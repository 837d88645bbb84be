"""Commands about models and nodes."""

from typing import Annotated

import typer

from tuneyard.cli.output import age, print_json, print_table, say, size
from tuneyard.cli.profile import Json, connect
from tuneyard.specs.errors import InputError

models = typer.Typer(help="Base and tuned models.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(models, name="models")
    app.command()(nodes)


@models.command("list")
def list_models(json: Json = False) -> None:
    """List base models and your tuned ones.

    Example: tuneyard models list
    """
    with connect() as client:
        found = client.models()
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
    if not model:
        raise InputError("A model has a name.", code="bad_id", hint="`tuneyard models list`")
    with connect() as client:
        found = client.model(model)
        if found.get("job") and found.get("artifact"):
            found["files"] = client.artifact_files(found["job"], found["artifact"])
    if json:
        print_json(found)
        return
    say(f"{found['id']}  {found['name']}  {found['kind']}  {size(found['bytes'])}")
    if found.get("base_model"):
        say(f"  over {found['base_model']}, by {found['job']}")
    if found.get("adapter"):
        say(f"  with {found['adapter']} in it")
    for entry in found.get("files", []):
        say(f"  {entry['path']}  {size(entry['size'])}  sha256 {entry['sha256']}")


def nodes(json: Json = False) -> None:
    """List nodes with their devices.

    Example: tuneyard nodes
    """
    with connect() as client:
        found = client.nodes()
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
