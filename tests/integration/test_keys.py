"""Keys made, listed and revoked by an administrator, and what they open."""

import json

import httpx
import pytest
from sqlalchemy import text
from support.apis import Api
from support.commands import Command, Done

from tuneyard.models.keys import NAME


@pytest.fixture
def keys(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`tuneyard keys` with the URL of the database's owner."""
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", api.db.owner.url)
    return Command(monkeypatch, capsys)


def made(done: Done) -> dict[str, str]:
    assert done.code == 0, done.err
    found: dict[str, str] = json.loads(done.out)
    return found


def me(api: Api, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{api.url}/api/v1/me", headers=headers, trust_env=False)


def test_a_key_that_was_made_opens_its_team_and_stands_in_no_table(api: Api, keys: Command) -> None:
    found = made(keys("keys", "create", "vision", "--role", "viewer", "--name", "ci", "--json"))
    assert me(api, found["key"]).json() == {"team": "vision", "role": "viewer", "key": "ci"}
    assert found["key"].startswith("ty-")
    rows = api.db.rows("SELECT api_keys::text AS row FROM api_keys")
    assert not any(found["key"] in row.row for row in rows)


def test_without_json_the_key_alone_is_printed(api: Api, keys: Command) -> None:
    done = keys("keys", "create", "vision")
    assert me(api, done.out.strip()).json()["role"] == "member"


def test_a_revoked_key_opens_nothing_and_revoking_twice_is_once(api: Api, keys: Command) -> None:
    found = made(keys("keys", "create", "vision", "--json"))
    first = made(keys("keys", "revoke", found["id"], "--json"))
    assert first["revoked_at"]
    assert made(keys("keys", "revoke", found["id"], "--json")) == first
    assert me(api, found["key"]).status_code == 401


def test_keys_are_listed_by_team_without_themselves(api: Api, keys: Command) -> None:
    found = made(keys("keys", "create", "vision", "--name", "ci", "--json"))
    made(keys("keys", "create", "speech", "--json"))
    listed = json.loads(keys("keys", "list", "vision", "--json").out)
    assert [(k["id"], k["team"], k["name"]) for k in listed] == [(found["id"], "vision", "ci")]
    everything = keys("keys", "list").out
    assert "speech" in everything
    assert found["key"] not in everything


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "Two Words"), "'Two Words' is no name for a team. (field team)"),
        (("create", "vision", "--name", "é"), "'é' is no name for a key. (field name)"),
        (("create", ""), "'' is no name for a team. (field team)"),
        (("create", "vision", "--role", "king"), "king"),
        (("revoke", "key_1"), "key_1"),
        (("revoke", "key_" + "0" * 32), "There is no such key. (field key)"),
    ],
)
def test_what_is_no_key_or_name_is_answered_with_a_sentence(
    keys: Command, arguments: tuple[str, ...], said: str
) -> None:
    done = keys("keys", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert keys("keys", "list", "vision", "--json").out == "[]\n"


def test_a_role_that_does_not_own_the_tables_is_told_so(
    api: Api, keys: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", api.db.url("api"))
    done = keys("keys", "create", "vision")
    assert done.code == 2
    assert "permission denied" in done.err
    assert "the role that owns the tables" in done.err


def test_a_database_that_is_away_or_a_wrong_password_is_said(
    api: Api, keys: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("postgresql://127.0.0.1:1/x", api.db.server.plan.url(password="wrong")):
        monkeypatch.setenv("TUNEYARD_DATABASE_URL", url)
        done = keys("keys", "list")
        assert done.code == 4
        assert "PostgreSQL cannot be reached" in done.err


def test_a_table_that_another_holds_is_not_waited_for_for_long(api: Api, keys: Command) -> None:
    with api.db.owner.begin() as tx:
        tx.execute(text("LOCK TABLE api_keys"))
        done = keys("keys", "create", "vision")
    assert done.code == 4
    assert "PostgreSQL is busy: canceling statement due to lock timeout." in done.err
    assert keys("keys", "list", "vision", "--json").out == "[]\n"


def test_names_of_teams_hold_what_a_url_and_a_shell_take() -> None:
    good = ("a", "default", "team-1", "a.b_c", "x" * 64)
    bad = ("", "-a", "a-", "A", "a b", "x" * 65, "a/b", "a\n")
    assert all(NAME.fullmatch(name) for name in good)
    assert not any(NAME.fullmatch(name) for name in bad)
