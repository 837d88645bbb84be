"""What a cluster has to offer, as the API answers it: models and nodes."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from tuneyard.specs.errors import NotFound
from tuneyard.specs.ids import is_id, parse_id, show_id
from tuneyard.specs.views import DeviceView, ModelView, NodeView, SlotView

# The newest row of a base model's name counts. Base models are of no team, tuned ones of one.
MODELS = """
    SELECT * FROM (
        SELECT DISTINCT ON (b.name) b.id, b.name, 'base' AS kind, NULL AS base_model,
            CAST(NULL AS uuid) AS job_id, CAST(NULL AS uuid) AS artifact_id,
            CAST(NULL AS uuid) AS adapter_artifact_id, b.digest, b.bytes,
            b.published_at AS created_at
        FROM base_models b ORDER BY b.name, b.published_at DESC
    ) newest
    UNION ALL
    SELECT m.id, m.name,
        CASE WHEN m.adapter_artifact_id IS NOT NULL THEN 'merged'
             WHEN m.kind = 'model' THEN 'whole' ELSE 'tuned' END,
        coalesce(b.name, p.name), m.job_id, m.artifact_id, m.adapter_artifact_id,
        a.digest, a.bytes, m.created_at
    FROM models m
    JOIN artifacts a ON a.id = m.artifact_id
    LEFT JOIN base_models b ON b.id = m.base_model_id
    LEFT JOIN models p ON p.id = m.parent_model_id
"""
ALL_MODELS = text(f"SELECT * FROM ({MODELS}) known ORDER BY created_at DESC, id")  # noqa: S608
ONE_MODEL = text(
    f"SELECT * FROM ({MODELS}) known WHERE name = :name OR id = :id ORDER BY kind LIMIT 1"  # noqa: S608
)


def list_models(tx: Connection) -> list[ModelView]:
    """All base models and the team's tuned ones, newest first."""
    return [_model_view(row) for row in tx.execute(ALL_MODELS)]


def show_model(tx: Connection, name: str) -> ModelView:
    """A model by its name or id; a base comes before a tuned one. Raises: NotFound."""
    kinds = [kind for kind in ("base_model", "model") if is_id(kind, name)]
    model_id = parse_id(kinds[0], name) if kinds else None
    row = tx.execute(ONE_MODEL, {"name": name, "id": model_id}).one_or_none()
    if row is None:
        raise NotFound("There is no such model here.", field="model")
    return _model_view(row)


def _model_view(row: Row[Any]) -> ModelView:
    return ModelView(
        id=show_id("base_model" if row.kind == "base" else "model", row.id),
        name=row.name,
        kind=row.kind,
        base_model=row.base_model,
        job=_shown("job", row.job_id),
        artifact=_shown("artifact", row.artifact_id),
        adapter=_shown("artifact", row.adapter_artifact_id),
        digest=row.digest,
        bytes=row.bytes,
        created_at=row.created_at,
    )


def _shown(kind: str, value: UUID | None) -> str | None:
    return show_id(kind, value) if value else None


# Who holds a slot is seen of all teams, for which job of one's own alone: attempts are hidden.
NODES = text("""
    SELECT n.id, n.name, n.capabilities, n.seen_at,
        CASE WHEN n.state <> 'down'
              AND n.seen_at < clock_timestamp() - make_interval(secs => :silence_s)
             THEN 'silent' ELSE n.state END AS state,
        d.id AS device_id, d.kind, d.uuid, d.name AS device_name, d.bytes AS device_bytes,
        d.state AS device_state, s.index AS slot_index, s.bytes AS slot_bytes, s.cores,
        l.attempt_id IS NOT NULL AS busy, a.job_id
    FROM nodes n
    LEFT JOIN devices d ON d.node_id = n.id
    LEFT JOIN slots s ON s.device_id = d.id AND s.retired_at IS NULL
    LEFT JOIN allocations l ON l.slot_id = s.id AND l.released_at IS NULL
    LEFT JOIN attempts a ON a.id = l.attempt_id
    ORDER BY n.name, d.kind DESC, d.uuid, s.index
""")


def list_nodes(tx: Connection, *, silence_s: float) -> list[NodeView]:
    """All nodes by name; one that was not heard of for ``silence_s`` seconds is silent."""
    by_node: dict[UUID, list[Row[Any]]] = {}
    for row in tx.execute(NODES, {"silence_s": silence_s}):
        by_node.setdefault(row.id, []).append(row)
    return [_node_view(rows) for rows in by_node.values()]


def _node_view(rows: Sequence[Row[Any]]) -> NodeView:
    by_device: dict[UUID, list[Row[Any]]] = {}
    for row in rows:
        if row.device_id is not None:
            by_device.setdefault(row.device_id, []).append(row)
    devices = [_device_view(each) for each in by_device.values()]
    slots = [(device, slot) for device in devices for slot in device.slots]
    return NodeView(
        id=show_id("node", rows[0].id),
        name=rows[0].name,
        state=rows[0].state,
        seen_at=rows[0].seen_at,
        capabilities=rows[0].capabilities,
        devices=devices,
        free_slots=sum(device.state == "ok" and not slot.busy for device, slot in slots),
        busy_slots=sum(slot.busy for _, slot in slots),
    )


def _device_view(rows: Sequence[Row[Any]]) -> DeviceView:
    first = rows[0]
    return DeviceView(
        id=show_id("device", first.device_id),
        kind=first.kind,
        uuid=first.uuid,
        name=first.device_name,
        bytes=first.device_bytes,
        state=first.device_state,
        slots=[_slot_view(row) for row in rows if row.slot_index is not None],
    )


def _slot_view(row: Row[Any]) -> SlotView:
    return SlotView(
        index=row.slot_index,
        bytes=row.slot_bytes,
        cores=row.cores,
        busy=row.busy,
        job=_shown("job", row.job_id),
    )
