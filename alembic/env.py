"""Alembic's entry: migrate the connection that tuneyard.models.migration hands over."""

from alembic import context

from tuneyard.models.tables import Row

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Row.metadata)
with context.begin_transaction():
    context.run_migrations()
