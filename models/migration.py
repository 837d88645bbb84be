"""Bringing a database to the newest schema, its roles to their passwords, and the first key in."""

import logging

from alembic import command
from alembic.config import Config
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import Connection, text

from tuneyard.models.engine import administer
from tuneyard.models.keys import add_key
from tuneyard.specs.settings import Settings
from tuneyard.specs.states import moves

log = logging.getLogger(__name__)

DEFAULT_TEAM = "default"


def migrate(settings: Settings) -> None:
    """Migrate as the owner, in one transaction; running it again changes nothing."""
    with administer(settings.database_url.get_secret_value(), "ty-migrate") as tx:
        upgrade(tx)
        load_transitions(tx)
        for role in ("api", "worker", "scheduler"):
            set_password(tx, f"tuneyard_{role}", getattr(settings, f"{role}_role_password"))
        if settings.first_api_key is not None:
            add_key(tx, DEFAULT_TEAM, settings.first_api_key.get_secret_value())
    log.info("database migrated", extra={"event": "database_migrated"})


def upgrade(tx: Connection, revision: str = "head") -> None:
    """Run the migrations up to a revision."""
    command.upgrade(_alembic(tx), revision)


def downgrade(tx: Connection, revision: str) -> None:
    """Undo migrations down to a revision; ``base`` leaves an empty database."""
    command.downgrade(_alembic(tx), revision)


def _alembic(tx: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "tuneyard:migrations")
    config.attributes["connection"] = tx
    return config


def load_transitions(tx: Connection) -> None:
    """Make the database's table of legal moves equal to specs/states.py."""
    tx.execute(text("DELETE FROM transitions"))
    tx.execute(
        text("INSERT INTO transitions (from_state, event, to_state) VALUES (:f, :e, :t)"),
        [{"f": f.value, "e": e.value, "t": t.value} for f, e, t in sorted(moves())],
    )


def set_password(tx: Connection, role: str, password: SecretStr | None) -> None:
    """Give a role its password, where one is set."""
    if password is not None:
        # ALTER ROLE takes no parameters: the literal is quoted by psycopg.
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}").format(
            sql.Identifier(role), sql.Literal(password.get_secret_value())
        )
        tx.exec_driver_sql(statement.as_string())
