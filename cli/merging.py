"""`tuneyard merge`: an adapter and its base become a model that stands alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.cli.jobs import Set, follow_submission
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.submitting import check_alone
from tuneyard.client import Client
from tuneyard.specs.documents import apply_overrides
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import is_id


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(merge)


def merge(
    adapter: Annotated[
        str, typer.Argument(help="A fine-tune (id or name), or its adapter (id or name).")
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    name: Annotated[
        str | None, typer.Option(help="What the model is called; unset: ADAPTER-merged.")
    ] = None,
    export_dir: Annotated[
        str | None, typer.Option("--export-dir", help="With --wait: a folder to write it to.")
    ] = None,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Merge an adapter into its base. A fine-tune that still runs is waited for.

    Example: tuneyard merge tuny --wait --export-dir ./tuny-merged
    """
    if not adapter:
        raise InputError("An adapter has a name.", code="bad_id", hint="`tuneyard models list`")
    document: dict[str, Any] = {"kind": "merge", "adapter": adapter}
    options = {"name": name, "export_dir": export_dir}
    document |= {field: value for field, value in options.items() if value is not None}
    document = apply_overrides(document, set_ or [])
    check_alone(document, Path.cwd())
    with connect() as client:
        document.setdefault("name", f"{_named(client, adapter)[:190]}-merged")
        return follow_submission(client, document, Path.cwd(), wait=wait, as_json=json)


def _named(client: Client, adapter: str) -> str:
    """What people call it."""
    if is_id("job", adapter):
        return str(client.job(adapter)["name"])
    if is_id("model", adapter):
        return str(client.model(adapter)["name"])
    return adapter
