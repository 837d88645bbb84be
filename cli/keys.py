"""Commands about API keys: run by an administrator who has the database owner's URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuneyard.cli.output import age, print_json, print_table, say
from tuneyard.cli.profile import Json
from tuneyard.cli.services import installed
from tuneyard.specs.ids import new_id, parse_id
from tuneyard.specs.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

keys = typer.Typer(
    help="API keys, made and revoked in the database itself: TUNEYARD_DATABASE_URL is its owner's.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(keys, name="keys")


@keys.command("create")
def create(
    team: Annotated[str, typer.Argument(help="The team; a new name makes a new team.")],
    role: Annotated[
        Literal["viewer", "member", "admin"],
        typer.Option(help="viewer looks, member submits too, admin administers."),
    ] = "member",
    name: Annotated[str, typer.Option(help="What the key is for. Empty: any.")] = "",
    json: Json = False,
) -> None:
    """Make a key and print it: it is shown this once and kept nowhere.

    Example: tuneyard keys create vision --role member --name ci
    """
    with _owner() as tx:
        from tuneyard.models.keys import add_key, find_key, new_key

        key = new_key()
        add_key(tx, team, key, name=name or f"key-{new_id().hex[-6:]}", role=role)
        found = find_key(tx, key).as_dict()
    if json:
        print_json(found | {"key": key})
        return
    say(key)


@keys.command("list")
def list_keys(
    team: Annotated[str | None, typer.Argument(help="Only this team's.")] = None,
    json: Json = False,
) -> None:
    """List keys; the keys themselves are kept nowhere.

    Example: tuneyard keys list
    """
    with _owner() as tx:
        from tuneyard.models.keys import list_keys as look

        found = [key.as_dict() for key in look(tx, team=team)]
    if json:
        print_json(found)
        return
    columns = ("id", "team", "name", "role", "age", "revoked")
    rows = [
        (k["id"], k["team"], k["name"], k["role"], age(k["created_at"]), age(k["revoked_at"]))
        for k in found
    ]
    print_table(columns, rows)


@keys.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, from `tuneyard keys list`.")],
    json: Json = False,
) -> None:
    """Let a key open nothing any more; every API process heeds it within five seconds.

    Example: tuneyard keys revoke key_01a20bdd69f973ceb6c54135d246fc6d
    """
    key_id = parse_id("api_key", key)
    with _owner() as tx:
        from tuneyard.models.keys import revoke_key

        found = revoke_key(tx, key_id).as_dict()
    if json:
        print_json(found)
        return
    say(f"{found['name']} of {found['team']} opens nothing any more")


@contextmanager
def _owner() -> "Iterator[Connection]":
    """A transaction as the owner of the tables. Raises: Unavailable, Forbidden."""
    settings = load_settings()
    with installed("api"):
        from tuneyard.models.engine import administer
    with administer(settings.database_url.get_secret_value(), "ty-keys") as tx:
        yield tx
