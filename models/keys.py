"""API keys: from a key to the team whose rows it opens; made and revoked by the tables' owner."""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection, text

from tuneyard.specs.errors import InputError, NotFound
from tuneyard.specs.ids import new_id, show_id

Role = Literal["viewer", "member", "admin"]

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
"""Names of teams and keys."""


def hash_key(key: str) -> bytes:
    """What is kept of an API key: its SHA-256. Keys are random, so no salt or stretching."""
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class Caller:
    """Whom a request is made for."""

    team_id: UUID
    team: str
    role: str  # viewer, member or admin
    key: str  # the key's name

    @property
    def may_write(self) -> bool:
        """Whether anything may be made, changed or deleted."""
        return self.role != "viewer"

    @property
    def sees_all_teams(self) -> bool:
        """Whether pages may be looked at that show the work of every team."""
        return self.role == "admin"


# Compared by hash: how long it takes says nothing about a key that is nearly right.
HOLDER = text("SELECT team_id, team_name, role, key_name FROM key_team(:hash)")


def key_holder(tx: Connection, key_hash: bytes) -> Caller | None:
    """Whose key this is, by its hash; None when it is unknown or revoked."""
    row = tx.execute(HOLDER, {"hash": key_hash}).one_or_none()
    return Caller(row.team_id, row.team_name, row.role, row.key_name) if row else None


@dataclass(frozen=True)
class KnownKey:
    """A key as administrators see it; the key itself is kept nowhere."""

    id: UUID
    team: str
    name: str
    role: str
    created_at: datetime
    revoked_at: datetime | None

    def as_dict(self) -> dict[str, str | None]:
        """The key as the command prints it."""
        return {
            "id": show_id("api_key", self.id),
            "team": self.team,
            "name": self.name,
            "role": self.role,
            "created_at": self.created_at.isoformat(),
            "revoked_at": self.revoked_at.isoformat() if self.revoked_at else None,
        }


def new_key() -> str:
    """Make a key: 256 random bits, recognisable to scanners of leaked secrets by its prefix."""
    return "ty-" + secrets.token_urlsafe(32)


def add_key(
    tx: Connection, team: str, key: str, *, name: str = "first", role: Role | str = "admin"
) -> None:
    """Make sure that a key exists, and its team. Raises: InputError for a name of a wrong form."""
    for field, value in (("team", team), ("name", name)):
        _check_name(field, value)
    tx.execute(
        text("INSERT INTO teams (id, name) VALUES (:id, :name) ON CONFLICT (name) DO NOTHING"),
        {"id": new_id(), "name": team},
    )
    tx.execute(
        text(
            "INSERT INTO api_keys (id, team_id, name, hash, role)"
            " SELECT :id, id, :name, :hash, :role FROM teams WHERE name = :team"
            " ON CONFLICT ON CONSTRAINT api_keys_hash_once DO NOTHING"
        ),
        {"id": new_id(), "hash": hash_key(key), "name": name, "role": role, "team": team},
    )


LISTED = """
SELECT k.id, t.name AS team, k.name, k.role, k.created_at, k.revoked_at
FROM api_keys k JOIN teams t ON t.id = k.team_id
"""


def list_keys(tx: Connection, *, team: str | None = None) -> list[KnownKey]:
    """All keys, or one team's, the oldest first."""
    rows = tx.execute(
        text(LISTED + " WHERE CAST(:team AS text) IS NULL OR t.name = :team ORDER BY t.name, k.id"),
        {"team": team},
    )
    return [KnownKey(*row) for row in rows]


def find_key(tx: Connection, key: str) -> KnownKey:
    """What is known of a key."""
    return KnownKey(*tx.execute(text(LISTED + " WHERE k.hash = :h"), {"h": hash_key(key)}).one())


def revoke_key(tx: Connection, key_id: UUID) -> KnownKey:
    """Let a key open nothing any more; twice is once. Raises: NotFound."""
    tx.execute(
        text("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE id = :id"
             " AND revoked_at IS NULL"),
        {"id": key_id},
    )  # fmt: skip
    row = tx.execute(text(LISTED + " WHERE k.id = :id"), {"id": key_id}).one_or_none()
    if row is None:
        raise NotFound("There is no such key.", field="key", hint="`tuneyard keys list` has ids")
    return KnownKey(*row)


def _check_name(field: str, value: str) -> None:
    if not NAME.fullmatch(value):
        raise InputError(
            f"{value!r} is no name for a {'team' if field == 'team' else 'key'}.",
            code="bad_name",
            field=field,
            hint="lower-case letters, digits, dots, dashes and underscores, at most 64",
        )
