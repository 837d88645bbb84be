"""What each node's cache holds, as its worker says and the scheduler reads: a hint, no truth."""

from collections.abc import Collection, Mapping
from uuid import UUID

from sqlalchemy import Connection, text, update

from tuneyard.models.events import SCHEDULER_CHANNEL, notify
from tuneyard.models.tables import NodeRow

ADD = text("""
    INSERT INTO node_cache (node_id, digest, bytes)
    SELECT :node, new.digest, new.bytes
    FROM unnest(CAST(:digests AS text[]), CAST(:bytes AS bigint[])) AS new (digest, bytes)
    ON CONFLICT (node_id, digest)
    DO UPDATE SET bytes = excluded.bytes, used_at = clock_timestamp()
""")
DROP = text("DELETE FROM node_cache WHERE node_id = :node AND digest = ANY (:digests)")
DROP_OTHERS = text("DELETE FROM node_cache WHERE node_id = :node AND digest <> ALL (:digests)")


def replace_cached(tx: Connection, node_id: UUID, entries: Mapping[str, int]) -> None:
    """All that a node has: digest -> bytes. What it is not said to have it has no more."""
    tx.execute(DROP_OTHERS, {"node": node_id, "digests": list(entries)})
    add_cached(tx, node_id, entries)


def add_cached(tx: Connection, node_id: UUID, entries: Mapping[str, int]) -> None:
    """Say that a node has these, digest -> bytes."""
    if entries:
        values = {"digests": list(entries), "bytes": list(entries.values())}
        tx.execute(ADD, {"node": node_id, **values})


def drop_cached(tx: Connection, node_id: UUID, digests: Collection[str]) -> None:
    """Say that a node has these no more."""
    if digests:
        tx.execute(DROP, {"node": node_id, "digests": list(digests)})


CACHED = text("""
    SELECT node_id, array_agg(digest) AS digests FROM node_cache
    WHERE digest = ANY (:digests) GROUP BY node_id
""")


def nodes_with(tx: Connection, digests: Collection[str]) -> dict[UUID, frozenset[str]]:
    """Node -> which of these digests it has."""
    if not digests:
        return {}
    rows = tx.execute(CACHED, {"digests": list(digests)})
    return {row.node_id: frozenset(row.digests) for row in rows}


def set_disk_low(tx: Connection, node_id: UUID, disk_low: bool) -> None:
    """Say whether a node has less free disk than its floor: nothing is placed on it while so."""
    tx.execute(update(NodeRow).where(NodeRow.id == node_id).values(disk_low=disk_low))
    notify(tx, SCHEDULER_CHANNEL)
