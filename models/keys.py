"""API keys: from a key to the team whose rows it opens."""

import hashlib
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text


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
