"""Nodes and what they offer: a worker registers its devices and slots, and clears them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert

from tuneyard.models.events import SCHEDULER_CHANNEL, notify
from tuneyard.models.tables import DeviceRow, NodeRow, SlotRow
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import new_id


@dataclass(frozen=True)
class OfferedDevice:
    """A device as its node's worker sees it; ``slot_cores`` has one entry for each slot."""

    kind: str
    uuid: str
    name: str
    bytes: int
    slot_cores: Sequence[Sequence[int]] = field(default_factory=lambda: [[]])


class NodeTaken(InputError):
    """Another worker serves a node of this name."""

    code = "node_taken"


@dataclass(frozen=True)
class Gateway:
    """Where a node's gateway is reached, and what opens it."""

    url: str
    token: str = field(repr=False)


def register_node(
    tx: Connection,
    name: str,
    *,
    boot_id: str,
    capabilities: dict[str, Any],
    devices: Sequence[OfferedDevice],
    lease_s: float = 60.0,
    gateway: Gateway | None = None,
) -> UUID:
    """Make or refresh a node's row, its devices and slots. Devices that are gone become lost.

    boot_id: names a life of the node; a worker of the same life may come again at any time, one
    of another life once the node has said goodbye or was silent for a lease. Raises: NodeTaken.
    """
    says = {
        "boot_id": boot_id,
        "capabilities": capabilities,
        "gateway_url": gateway.url if gateway else None,
        "gateway_token": gateway.token if gateway else None,
    }
    node_id = _upsert_node(tx, name, says, lease_s)
    for device in devices:
        device_id = _upsert_device(tx, node_id, device)
        _upsert_slots(tx, device_id, device)
    tx.execute(
        update(DeviceRow)
        .where(DeviceRow.node_id == node_id, DeviceRow.uuid.not_in([d.uuid for d in devices]))
        .values(state="lost", state_at=func.clock_timestamp())
    )
    notify(tx, SCHEDULER_CHANNEL)
    return node_id


def _upsert_node(tx: Connection, name: str, says: dict[str, Any], lease_s: float) -> UUID:
    row = insert(NodeRow).values(id=new_id(), name=name, state="up", **says)
    fresh = {
        **says,
        "state": "up",
        "started_at": func.clock_timestamp(),
        "seen_at": func.clock_timestamp(),
    }
    silent_since = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, lease_s)
    free = or_(
        NodeRow.boot_id == says["boot_id"], NodeRow.state == "down", NodeRow.seen_at < silent_since
    )
    upsert = row.on_conflict_do_update(index_elements=["name"], set_=fresh, where=free)
    node_id = tx.execute(upsert.returning(NodeRow.id)).scalar_one_or_none()
    if node_id is None:
        raise NodeTaken(
            f"Another worker serves the node {name}.",
            field="node_name",
            hint="give each node a name of its own by TUNEYARD_NODE_NAME; if that worker died, "
            f"the name is free {lease_s:g} s after it was last seen",
        )
    return node_id


def _upsert_device(tx: Connection, node_id: UUID, device: OfferedDevice) -> UUID:
    cores = sorted({core for slot in device.slot_cores for core in slot})
    facts = {"name": device.name, "bytes": device.bytes, "cores": cores}
    row = insert(DeviceRow).values(
        id=new_id(), node_id=node_id, kind=device.kind, uuid=device.uuid, **facts
    )
    # One that was lost and is back must be looked at before it is placed on.
    back = text("CASE WHEN devices.state = 'lost' THEN 'unconfirmed' ELSE devices.state END")
    upsert = row.on_conflict_do_update(
        index_elements=["node_id", "uuid"], set_=facts | {"state": back}
    )
    return tx.execute(upsert.returning(DeviceRow.id)).scalar_one()


def _upsert_slots(tx: Connection, device_id: UUID, device: OfferedDevice) -> None:
    for index, cores in enumerate(device.slot_cores):
        facts = {"cores": list(cores), "bytes": device.bytes // len(device.slot_cores)}
        row = insert(SlotRow).values(id=new_id(), device_id=device_id, index=index, **facts)
        tx.execute(
            row.on_conflict_do_update(
                index_elements=["device_id", "index"], set_=facts | {"retired_at": None}
            )
        )
    tx.execute(
        update(SlotRow)
        .where(SlotRow.device_id == device_id, SlotRow.index >= len(device.slot_cores))
        .values(retired_at=func.clock_timestamp())
    )


def report_alive(tx: Connection, node_id: UUID) -> None:
    """The node's worker lives."""
    seen = {"seen_at": func.clock_timestamp()}
    tx.execute(update(NodeRow).where(NodeRow.id == node_id).values(seen))


def leave(tx: Connection, node_id: UUID) -> None:
    """The worker ends in good order: nothing shall be placed on its node."""
    tx.execute(update(NodeRow).where(NodeRow.id == node_id).values(state="down"))


@dataclass(frozen=True)
class HeldDevice:
    """A device of a node that is not ``ok``."""

    id: UUID
    kind: str
    uuid: str
    state: str
    seconds: float  # in this state


def devices_to_clear(tx: Connection, node_id: UUID) -> list[HeldDevice]:
    """A node's devices that wait to be seen empty."""
    age = func.extract("epoch", func.clock_timestamp() - DeviceRow.state_at)
    rows = tx.execute(
        select(DeviceRow.id, DeviceRow.kind, DeviceRow.uuid, DeviceRow.state, age.label("seconds"))
        .where(DeviceRow.node_id == node_id)
        .where(DeviceRow.state.in_(["cleaning", "unconfirmed", "draining"]))
    )
    return [HeldDevice(r.id, r.kind, r.uuid, r.state, float(r.seconds)) for r in rows]


def set_device_state(tx: Connection, device: HeldDevice, state: str) -> None:
    """Move a device on, unless someone else has moved it meanwhile."""
    tx.execute(
        update(DeviceRow)
        .where(DeviceRow.id == device.id, DeviceRow.state == device.state)
        .values(state=state, state_at=func.clock_timestamp())
    )
    notify(tx, SCHEDULER_CHANNEL)


ENDED_MARKS = text("""
    SELECT a.id FROM unnest(CAST(:ids AS uuid[])) AS marked (id)
    LEFT JOIN attempts a ON a.id = marked.id
    WHERE a.ended_at IS NOT NULL
""")


def ended_among(tx: Connection, attempt_ids: Sequence[UUID]) -> set[UUID]:
    """Which of these attempts are over: their processes may be killed."""
    return set(tx.execute(ENDED_MARKS, {"ids": list(attempt_ids)}).scalars())
