"""Which job gets which slots: pure decisions over rows that were read before."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from uuid import UUID

from tuneyard.models.placements import Capacity, FreeSlot, Placement, QueuedJob


@dataclass(frozen=True)
class Plan:
    """One look's decisions: who is placed where, and why the others wait."""

    placements: Sequence[tuple[QueuedJob, Placement]] = field(default_factory=list)
    wait_reasons: Mapping[UUID, str] = field(default_factory=dict)


def plan(
    jobs: Sequence[QueuedJob],
    free: Sequence[FreeSlot],
    capacity: Mapping[str, Mapping[str, Capacity]],
    *,
    cached: Mapping[UUID, frozenset[str]] = MappingProxyType({}),
) -> Plan:
    """Place jobs in their order; the first one that fits nowhere holds a node back for itself.

    cached: node -> digests of what it has.

    A job that waits for several devices would starve if smaller ones took each as it came free.
    So the first waiting job of each kind of device reserves the node where it will fit soonest;
    those behind it may use the other nodes only.
    """
    left = list(free)
    placements: list[tuple[QueuedJob, Placement]] = []
    reasons: dict[UUID, str] = {}
    reserved: dict[str, str] = {}
    waiting: Counter[str] = Counter()
    for job in jobs:
        usable = [s for s in left if reserved.get(job.device_kind) != s.node_name]
        chosen = place(job, usable, cached)
        if chosen is not None:
            placements.append((job, chosen))
            left = [slot for slot in left if slot.id not in chosen.slot_ids]
            continue
        ahead = waiting[job.device_kind]
        waiting[job.device_kind] += 1
        reasons[job.id] = wait_reason(job, left, capacity.get(job.device_kind, {}), ahead)
        if job.device_kind not in reserved and job.devices_each > 1:
            node = _soonest_node(job, left, capacity.get(job.device_kind, {}))
            if node is not None:
                reserved[job.device_kind] = node
    return Plan(placements, reasons)


def place(
    job: QueuedJob,
    free: Sequence[FreeSlot],
    cached: Mapping[UUID, frozenset[str]] = MappingProxyType({}),
) -> Placement | None:
    """Choose a single node that holds the whole demand, or None.

    The one that has most of the job's inputs in its cache; then the fullest; then the lowest
    name. On the node: the lowest slot index, then device.
    """
    by_node: dict[tuple[str, UUID], list[FreeSlot]] = {}
    for slot in free:
        if slot.kind == job.device_kind:
            by_node.setdefault((slot.node_name, slot.node_id), []).append(slot)
    fitting = {node: slots for node, slots in by_node.items() if len(slots) >= job.devices_each}
    if not fitting:
        return None
    had = {node: len(job.digests & cached.get(node[1], frozenset())) for node in fitting}
    node = min(fitting, key=lambda node: (-had[node], len(fitting[node]), node))
    slots = sorted(fitting[node], key=lambda s: (s.index, s.device_uuid))[: job.devices_each]
    name, node_id = node
    return Placement(node_id, name, tuple(s.id for s in slots), tuple(s.device_uuid for s in slots))


def wait_reason(
    job: QueuedJob, left: Sequence[FreeSlot], capacity: Mapping[str, Capacity], ahead: int
) -> str:
    """Why a job waits, in a sentence for its owner. ahead: others that wait for its kind."""
    kind = {"gpu": "GPU", "cpu": "CPU slot"}[job.device_kind]
    wanted = f"{job.devices_each} {kind}{'s' if job.devices_each > 1 else ''}"
    if not capacity:
        return f"waits for {wanted}: no node offers any"
    largest = max(node.slots for node in capacity.values())
    if largest < job.devices_each:
        return f"waits for {wanted}: the largest node has {largest}"
    full = sorted(name for name, node in capacity.items() if node.disk_low)
    if len(full) == len(capacity):
        return f"waits for {wanted}: the disk of {', '.join(full)} is nearly full"
    free = sum(1 for slot in left if slot.kind == job.device_kind)
    total = sum(node.slots for node in capacity.values() if not node.disk_low)
    reason = f"waits for {wanted}: {total - free} of {total} busy"
    reason += f", {ahead} ahead of it" if ahead else ""
    return reason + (f"; the disk of {', '.join(full)} is nearly full" if full else "")


def _soonest_node(
    job: QueuedJob, left: Sequence[FreeSlot], capacity: Mapping[str, Capacity]
) -> str | None:
    """The node that could hold the job and has most slots free already."""
    large_enough = [name for name, node in capacity.items() if node.slots >= job.devices_each]
    if not large_enough:
        return None
    free = {name: sum(1 for s in left if s.node_name == name) for name in large_enough}
    return min(large_enough, key=lambda name: (-free[name], name))
