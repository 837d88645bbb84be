"""What the scheduler reads and writes: the queue, free slots, placements, expired leases."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, func, insert, select, text, update

from tuneyard.models.attempts import AttemptRef, End, ask_to_stop, end_attempt, nodes_of
from tuneyard.models.events import apply_event, lock_job, node_channel, notify
from tuneyard.models.leadership import check_epoch
from tuneyard.models.tables import AllocationRow, AttemptRow, JobRow, MemberRow
from tuneyard.specs.exits import Cause, Outcome, StopReason, Verdict
from tuneyard.specs.ids import new_id
from tuneyard.specs.states import JobEvent, JobState


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits for devices."""

    id: UUID
    kind: str
    name: str
    devices_each: int
    device_kind: str
    digests: frozenset[str] = frozenset()  # of its inputs, as nodes' caches know them


@dataclass(frozen=True)
class FreeSlot:
    """A slot that nobody holds, on a device that is ok, on a node that is heard of."""

    id: UUID
    node_id: UUID
    node_name: str
    device_uuid: str
    kind: str
    index: int


@dataclass(frozen=True)
class Placement:
    """The slots that an attempt gets: all on one node."""

    node_id: UUID
    node_name: str
    slot_ids: tuple[UUID, ...]
    device_uuids: tuple[str, ...]


QUEUE = text("""
    SELECT id, kind, name, device_kind, CAST(demand ->> 'devices_each' AS integer) AS devices_each,
        array(
            SELECT b.digest FROM jsonb_each(jobs.inputs) AS input
            JOIN base_models b ON b.id = CAST(input.value ->> 'base_model' AS uuid)
            UNION ALL
            SELECT a.digest FROM jsonb_each(jobs.inputs) AS input
            JOIN artifacts a ON a.id = CAST(input.value ->> 'artifact' AS uuid)
            UNION ALL
            -- A download goes where an earlier one of the same source has left its files.
            SELECT b.digest FROM base_models b
            WHERE jobs.kind = 'download' AND b.source = jobs.spec ->> 'source'
        ) AS digests
    FROM jobs
    WHERE state = 'queued' AND (not_before IS NULL OR not_before <= clock_timestamp())
    ORDER BY priority DESC, id
    LIMIT :limit
""")


def queue(tx: Connection, *, limit: int) -> list[QueuedJob]:
    """The head of the queue: highest priority first, then oldest."""
    rows = tx.execute(QUEUE, {"limit": limit})
    return [
        QueuedJob(r.id, r.kind, r.name, r.devices_each, r.device_kind, frozenset(r.digests))
        for r in rows
    ]


FREE = text("""
    SELECT s.id, n.id AS node_id, n.name AS node_name, d.uuid, d.kind, s.index AS slot_index
    FROM slots s
    JOIN devices d ON d.id = s.device_id
    JOIN nodes n ON n.id = d.node_id
    WHERE d.state = 'ok' AND n.state = 'up' AND NOT n.disk_low AND s.retired_at IS NULL
      -- A silent node gets nothing new; what it has is its leases' affair.
      AND n.seen_at > clock_timestamp() - make_interval(secs => :silence_s)
      AND NOT EXISTS (
          SELECT 1 FROM allocations l WHERE l.slot_id = s.id AND l.released_at IS NULL)
    ORDER BY n.name, d.uuid, s.index
""")


def free_slots_now(tx: Connection, *, silence_s: float) -> list[FreeSlot]:
    """All slots that could be given away at this moment."""
    rows = tx.execute(FREE, {"silence_s": silence_s})
    return [FreeSlot(r.id, r.node_id, r.node_name, r.uuid, r.kind, r.slot_index) for r in rows]


@dataclass(frozen=True)
class Placed:
    """A placement that was committed, for its hint."""

    ref: AttemptRef
    kind: str
    name: str
    node_id: UUID
    device_uuids: tuple[str, ...]


def place_job(
    tx: Connection, job: QueuedJob, placement: Placement, *, epoch: int, lease_s: float
) -> Placed | None:
    """queued -> dispatched, with an attempt, its member and its slots. None: no longer queued.

    Raises: StaleToken when another scheduler leads; IntegrityError when a slot was taken
    meanwhile (nothing is kept then: place anew from fresh rows).
    """
    check_epoch(tx, epoch)
    locked = lock_job(tx, job.id)
    if locked.state is not JobState.QUEUED or not _devices_still_ok(tx, placement.slot_ids):
        return None
    ref = _insert_attempt(tx, job.id, locked.team_id)
    tx.execute(
        insert(MemberRow).values(
            attempt_id=ref.id,
            rank=0,
            node_id=placement.node_id,
            lease_expires_at=_in_seconds(lease_s),
        )
    )
    tx.execute(
        insert(AllocationRow),
        [{"attempt_id": ref.id, "slot_id": slot, "rank": 0} for slot in placement.slot_ids],
    )
    data = {
        "attempt": ref.number,
        "node": placement.node_name,
        "devices": list(placement.device_uuids),
    }
    apply_event(tx, job.id, JobEvent.PLACE, attempt_id=ref.id, data=data)
    tx.execute(update(JobRow).where(JobRow.id == job.id).values(wait_reason=None, not_before=None))
    notify(tx, node_channel(placement.node_id))
    return Placed(ref, job.kind, job.name, placement.node_id, placement.device_uuids)


def _devices_still_ok(tx: Connection, slot_ids: Sequence[UUID]) -> bool:
    held = tx.execute(
        text(
            "SELECT d.state FROM devices d JOIN slots s ON s.device_id = d.id"
            " WHERE s.id = ANY(:slots) ORDER BY d.id FOR SHARE OF d"
        ),
        {"slots": list(slot_ids)},
    )
    return all(state == "ok" for state in held.scalars())


def _insert_attempt(tx: Connection, job_id: UUID, team_id: UUID) -> AttemptRef:
    newest = select(func.coalesce(func.max(AttemptRow.number), 0)).where(
        AttemptRow.job_id == job_id
    )
    row = tx.execute(
        insert(AttemptRow)
        .values(id=new_id(), team_id=team_id, job_id=job_id, number=newest.scalar_subquery() + 1)
        .returning(AttemptRow.id, AttemptRow.number, AttemptRow.token)
    ).one()
    return AttemptRef(row.id, job_id, team_id, row.number, row.token)


def _in_seconds(seconds: float) -> object:
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


UNCLAIMED = text("""
    SELECT a.id, a.job_id, a.team_id, a.number, a.token, j.kind, j.name, m.node_id,
           array(SELECT d.uuid FROM allocations l JOIN slots s ON s.id = l.slot_id
                 JOIN devices d ON d.id = s.device_id WHERE l.attempt_id = a.id) AS uuids
    FROM members m JOIN attempts a ON a.id = m.attempt_id JOIN jobs j ON j.id = a.job_id
    WHERE m.claimed_at IS NULL AND m.ended_at IS NULL AND a.ended_at IS NULL
      AND a.started_at < clock_timestamp() - make_interval(secs => :age_s)
""")


def unclaimed(tx: Connection, *, age_s: float) -> list[Placed]:
    """Attempts that no worker has taken for a while: their hints may be lost."""
    return [
        Placed(
            AttemptRef(row.id, row.job_id, row.team_id, row.number, row.token),
            row.kind,
            row.name,
            row.node_id,
            tuple(row.uuids),
        )
        for row in tx.execute(UNCLAIMED, {"age_s": age_s})
    ]


EXPIRED = text("""
    SELECT DISTINCT a.id, a.job_id, a.team_id, a.number, a.token
    FROM members m JOIN attempts a ON a.id = m.attempt_id
    WHERE m.ended_at IS NULL AND a.ended_at IS NULL AND m.lease_expires_at < clock_timestamp()
""")

STILL_EXPIRED = text("""
    SELECT bool_or(claimed_at IS NOT NULL) AS claimed, string_agg(n.name, ', ') AS nodes
    FROM members m JOIN nodes n ON n.id = m.node_id
    WHERE m.attempt_id = :attempt AND m.ended_at IS NULL
      AND m.lease_expires_at < clock_timestamp()
    HAVING count(*) > 0
""")


def expired(tx: Connection) -> list[AttemptRef]:
    """Live attempts of which a member's lease has run out."""
    rows = tx.execute(EXPIRED)
    return [AttemptRef(r.id, r.job_id, r.team_id, r.number, r.token) for r in rows]


def reap(tx: Connection, ref: AttemptRef, *, epoch: int, backoff_s: float) -> JobState | None:
    """End an attempt whose lease ran out; None when it was renewed or ended meanwhile.

    Its devices become ``unconfirmed``: only their node can say that nothing runs there. One that
    was never claimed has run nowhere, so its devices are free at once.
    """
    check_epoch(tx, epoch)
    lock_job(tx, ref.job_id)
    live = tx.execute(
        select(AttemptRow.id)
        .where(AttemptRow.id == ref.id, AttemptRow.ended_at.is_(None))
        .with_for_update()
    ).one_or_none()
    # Lock the members before the lease is judged: a renewal may be on its way.
    tx.execute(select(MemberRow.rank).where(MemberRow.attempt_id == ref.id).with_for_update())
    gone = tx.execute(STILL_EXPIRED, {"attempt": ref.id}).one_or_none()
    if live is None or gone is None:
        return None
    what = "was not renewed" if gone.claimed else "was never claimed"
    end = End(Verdict(Outcome.LOST, Cause.NODE_LOST), evidence=f"The lease of {gone.nodes} {what}.")
    device_state = "unconfirmed" if gone.claimed else "ok"
    return end_attempt(tx, ref, end, backoff_s=backoff_s, device_state=device_state)


@dataclass(frozen=True)
class Silence:
    """How much of the cluster is heard of."""

    nodes_with_members: int
    silent_nodes: int
    database_up_s: float

    def mass_silence(self) -> bool:
        """More than half of at least three nodes are silent: it is rather us than them."""
        return self.nodes_with_members >= 3 and self.silent_nodes * 2 > self.nodes_with_members


SILENCE = text("""
    SELECT count(*) AS nodes,
           count(*) FILTER (
               WHERE n.seen_at < clock_timestamp() - make_interval(secs => :lease_s)) AS silent,
           extract(epoch FROM clock_timestamp() - pg_postmaster_start_time()) AS up_s
    FROM nodes n
    WHERE EXISTS (SELECT 1 FROM members m WHERE m.node_id = n.id AND m.ended_at IS NULL)
""")


def silence(tx: Connection, *, lease_s: float) -> Silence:
    """Count the nodes with live members, and those not heard of for a lease."""
    row = tx.execute(SILENCE, {"lease_s": lease_s}).one()
    return Silence(row.nodes, row.silent, float(row.up_s))


OVERDUE = text("""
    SELECT j.id FROM jobs j
    WHERE j.state IN ('running', 'pausing') AND j.spec ->> 'max_runtime_s' IS NOT NULL
      -- The time that all attempts of the job ran.
      AND (SELECT sum(extract(epoch FROM coalesce(a.ended_at, clock_timestamp()) - a.running_at))
           FROM attempts a WHERE a.job_id = j.id)
          > CAST(j.spec ->> 'max_runtime_s' AS double precision)
""")


def stop_overdue(tx: Connection, *, epoch: int) -> int:
    """Ask attempts of jobs that ran longer than they may to stop; returns how many."""
    check_epoch(tx, epoch)
    stopped = 0
    for job_id in tx.execute(OVERDUE).scalars().all():
        attempt = ask_to_stop(tx, job_id, StopReason.MAX_RUNTIME)
        if attempt is not None:
            stopped += 1
            for node in nodes_of(tx, attempt):
                notify(tx, node_channel(node))
    return stopped


def set_wait_reasons(tx: Connection, reasons: dict[UUID, str]) -> None:
    """Write why queued jobs wait, where that has changed."""
    if not reasons:
        return
    tx.execute(
        text("""
            UPDATE jobs j SET wait_reason = w.reason
            FROM unnest(CAST(:ids AS uuid[]), CAST(:reasons AS text[])) AS w (id, reason)
            WHERE j.id = w.id AND j.state = 'queued' AND j.wait_reason IS DISTINCT FROM w.reason
        """),
        {"ids": list(reasons), "reasons": list(reasons.values())},
    )


@dataclass(frozen=True)
class Capacity:
    """What a node could hold of one kind of device if nothing was busy."""

    slots: int
    disk_low: bool = False


CAPACITY = text("""
    SELECT n.name, n.disk_low, d.kind, count(*) AS slots
    FROM slots s JOIN devices d ON d.id = s.device_id JOIN nodes n ON n.id = d.node_id
    WHERE s.retired_at IS NULL AND d.state <> 'lost'
    GROUP BY n.name, n.disk_low, d.kind
""")


def capacity(tx: Connection) -> dict[str, dict[str, Capacity]]:
    """Kind of device -> node's name -> what it could hold."""
    nodes: dict[str, dict[str, Capacity]] = {}
    for row in tx.execute(CAPACITY):
        nodes.setdefault(row.kind, {})[row.name] = Capacity(row.slots, row.disk_low)
    return nodes
