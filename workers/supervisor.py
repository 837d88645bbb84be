"""The node's supervisor: asks Postgres what is placed here, keeps it, renews, clears devices.

It runs before Celery consumes and needs none of it: hints and NOTIFY only make it look sooner.
"""

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from tuneyard.models import artifacts, attempts, nodes
from tuneyard.models.engine import Database
from tuneyard.models.events import node_channel
from tuneyard.specs.beats import beat
from tuneyard.specs.errors import BadId, Unavailable
from tuneyard.specs.exits import StopReason
from tuneyard.specs.ids import parse_id, show_id
from tuneyard.specs.settings import Settings
from tuneyard.store.remote import Store
from tuneyard.workers.guarding import boottime, kill_marked, marked_attempts, node_identity
from tuneyard.workers.inventory import Inventory, inventory_of, node_name, offered_devices
from tuneyard.workers.keeping import Keeper, Node

log = logging.getLogger(__name__)

HELD_TOO_LONG_S = 30.0
"""A GPU whose memory stays held for so long is drained, not handed on."""

SEEN_EMPTY = 2
"""So many looks in a row must find a GPU empty."""

CLEAR_EVERY_S = 0.25
SWEEP_EVERY_S = 60.0
WORK_KEPT_S = 24 * 3600


@dataclass
class Supervisor:
    """All attempts of one node."""

    node: Node
    name: str
    inventory: Inventory
    boot_id: str
    stopping: threading.Event
    keepers: dict[UUID, Keeper] = field(default_factory=dict)
    woken: threading.Event = field(default_factory=threading.Event)
    on_end: Callable[[Keeper], None] = lambda keeper: None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _empty_looks: dict[UUID, int] = field(default_factory=dict)
    _swept_at: float = 0.0

    def start(self) -> None:
        """Look once, so that what runs already is kept again, then go on in threads."""
        self.look()
        for task in (self._look_often, self._renew_often, self._listen, self._clear_often):
            threading.Thread(target=task, name=task.__name__.strip("_"), daemon=True).start()

    def wake(self) -> None:
        """Look soon: a hint came."""
        self.woken.set()

    def keeper_of(self, attempt_id: UUID) -> Keeper | None:
        """Who keeps an attempt, if it is kept here."""
        return self.keepers.get(attempt_id)

    def shut_down(self, *, keep_runners: bool) -> None:
        """Stop attempts at a checkpoint and publish, or leave the runners to the next worker."""
        self.stopping.set()
        if keep_runners:
            return
        with self._lock:
            keepers = list(self.keepers.values())
        self._ask_to_stop(keepers)
        deadline = time.monotonic() + self.node.settings.stop_grace_s + HELD_TOO_LONG_S
        for keeper in keepers:
            keeper.done.wait(max(0.0, deadline - time.monotonic()))
        try:
            with self.node.db.begin() as tx:
                nodes.leave(tx, self.node.id)
        except Unavailable:
            pass  # silence says the same, later

    def _ask_to_stop(self, keepers: list[Keeper]) -> None:
        for keeper in keepers:
            try:
                with self.node.db.begin() as tx:
                    attempts.ask_to_stop(tx, keeper.ref.job_id, StopReason.SHUTDOWN)
            except Unavailable:
                pass  # unasked, its end counts as lease_fenced, which is uncharged too
            keeper.stop(StopReason.SHUTDOWN)

    # Looking -----------------------------------------------------------------------------------

    def _look_often(self) -> None:
        while not self.stopping.is_set():
            beat(self.node.settings, "worker")
            try:
                self.look()
                self._sweep()
            except Unavailable as error:
                log.debug("database away", extra={"event": "database_away", "code": error.code})
            except Exception:
                log.exception("look failed", extra={"event": "look_failed"})
            self.woken.wait(self.node.settings.poll_s * random.uniform(0.8, 1.0))  # noqa: S311
            self.woken.clear()

    def look(self) -> None:
        """Ask Postgres what is placed here; claim what is new, pass on what shall stop."""
        requested_at = boottime()
        with self.node.db.begin() as tx:
            placed = attempts.assignments(tx, self.node.id)
        with self._lock:
            self._forget_the_done()
            for assignment in placed:
                keeper = self.keepers.get(assignment.ref.id)
                if keeper is None:
                    keeper = self._take(assignment, requested_at)
                if keeper is not None and assignment.stop_reason is not None:
                    keeper.stop(assignment.stop_reason)

    def _forget_the_done(self) -> None:
        for keeper in [k for k in self.keepers.values() if k.done.is_set()]:
            del self.keepers[keeper.ref.id]
            self.on_end(keeper)

    def _take(self, assignment: attempts.Assignment, requested_at: float) -> Keeper | None:
        """Claim a new attempt, or take one up again that an earlier worker had claimed."""
        if not assignment.claimed and not self._claim(assignment.ref):
            return None
        if assignment.claimed:
            # The lease that an earlier worker left may be nearly over: renew before trusting it.
            requested_at = boottime()
            with self.node.db.begin_reserved() as tx:
                renewed = attempts.renew_leases(
                    tx, [assignment.ref], self.node.id, lease_s=self.node.settings.lease_s
                )
            if not renewed:
                return None
        keeper = Keeper(self.node, assignment, renewed_at=requested_at)
        self.keepers[assignment.ref.id] = keeper
        keeper.start()
        return keeper

    def _claim(self, ref: attempts.AttemptRef) -> bool:
        free = shutil.disk_usage(self.node.settings.home).free
        if free < self.node.settings.disk_floor_bytes:
            fields = {"event": "disk_low", "free_bytes": free}
            log.warning("too little disk to claim anything", extra=fields)
            return False
        with self.node.db.begin() as tx:
            return attempts.claim(
                tx, ref, self.node.id, boot_id=self.boot_id, lease_s=self.node.settings.lease_s
            )

    def _listen(self) -> None:
        """Look soon at each NOTIFY; a lost connection is made anew."""
        while not self.stopping.is_set():
            try:
                with self.node.db.listener() as connection:
                    connection.execute(f'LISTEN "{node_channel(self.node.id)}"')
                    while not self.stopping.is_set():
                        for _ in connection.notifies(timeout=1.0, stop_after=1):
                            self.wake()
            except Exception as error:
                fields = {"event": "listener_lost", "error": str(error)}
                log.debug("listener lost", extra=fields)
                self.stopping.wait(1.0)

    # Renewing ----------------------------------------------------------------------------------

    def _renew_often(self) -> None:
        """Renew until the last keeper is done, through a shutdown too."""
        while not (self.stopping.is_set() and not self._live()):
            try:
                self.renew()
            except Unavailable as error:
                fields = {"event": "renewal_failed", "code": error.code}
                log.warning("leases not renewed", extra=fields)
            except Exception:
                log.exception("renewal failed", extra={"event": "renewal_failed"})
            time.sleep(self.node.settings.renew_every_s)

    def _live(self) -> list[Keeper]:
        with self._lock:
            return [k for k in self.keepers.values() if not k.done.is_set()]

    def renew(self) -> None:
        """Renew all leases in one statement; what was not renewed is over."""
        keepers = self._live()
        requested_at = boottime()
        with self.node.db.begin_reserved() as tx:
            renewed = attempts.renew_leases(
                tx, [k.ref for k in keepers], self.node.id, lease_s=self.node.settings.lease_s
            )
        for keeper in keepers:
            if keeper.ref.id in renewed:
                keeper.renewed(requested_at)
            elif not keeper.done.is_set():
                keeper.fence()

    # Devices -----------------------------------------------------------------------------------

    def _clear_often(self) -> None:
        while not self.stopping.is_set():
            try:
                self.clear_devices()
            except Unavailable:
                pass  # seen and said elsewhere; looked at again in a moment
            except Exception:
                log.exception("clearing failed", extra={"event": "clearing_failed"})
            self.stopping.wait(CLEAR_EVERY_S)

    def clear_devices(self) -> None:
        """Give back devices that are seen to be empty; drain those that stay held."""
        with self.node.db.begin() as tx:
            held = nodes.devices_to_clear(tx, self.node.id)
        if any(device.state == "unconfirmed" for device in held):
            self.kill_ended()
        for device in held:
            state = self._judge_device(device)
            if state is not None:
                with self.node.db.begin() as tx:
                    nodes.set_device_state(tx, device, state)

    def _judge_device(self, device: nodes.HeldDevice) -> str | None:
        empty = device.kind == "cpu" or self.inventory.is_empty(device.uuid)
        looks = self._empty_looks.get(device.id, 0) + 1 if empty else 0
        self._empty_looks[device.id] = looks
        if looks >= SEEN_EMPTY or (empty and device.kind == "cpu"):
            del self._empty_looks[device.id]
            return "ok"
        if device.state != "draining" and device.seconds > HELD_TOO_LONG_S:
            log.warning("GPU stays held", extra={"event": "gpu_draining", "gpu": device.uuid})
            return "draining"
        return None

    def kill_ended(self) -> None:
        """Kill every process on this node that bears the mark of an attempt that is over."""
        marked: dict[UUID, str] = {}
        for text in marked_attempts():
            try:
                marked[parse_id("attempt", text)] = text
            except BadId:
                continue
        with self.node.db.begin() as tx:
            ended = nodes.ended_among(tx, list(marked))
        kill_marked({marked[each] for each in ended})

    # Housekeeping --------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove work folders that nobody needs any more, and what pruned artifacts left."""
        if time.monotonic() - self._swept_at < SWEEP_EVERY_S:
            return
        self._swept_at = time.monotonic()
        live = {show_id("attempt", key) for key in self.keepers}
        for folder in (self.node.settings.home / "work").iterdir():
            if folder.name not in live and time.time() - folder.stat().st_mtime > WORK_KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
        with self.node.db.begin() as tx:
            pruned = artifacts.artifacts_to_sweep(tx)
        for artifact_id in pruned:
            self.node.store.remove_folder("artifacts", artifact_id)
        if pruned:
            with self.node.db.begin() as tx:
                artifacts.mark_swept(tx, pruned)
        self.node.store.sweep_aside()


def register(
    settings: Settings, capabilities: Mapping[str, object], stopping: threading.Event
) -> Supervisor:
    """Write this node and its devices into the database. Raises: Unavailable."""
    db = Database(settings.database_url.get_secret_value(), f"ty-worker@{node_name(settings)}")
    for folder in ("work", "cache"):
        (settings.home / folder).mkdir(parents=True, exist_ok=True)
    inventory = inventory_of(settings)
    boot_id = node_identity().boot_id
    with db.begin() as tx:
        node_id = nodes.register_node(
            tx,
            node_name(settings),
            boot_id=boot_id,
            capabilities=dict(capabilities),
            devices=offered_devices(inventory, settings.cpu_slots),
        )
    node = Node(node_id, db, Store(settings.store_root), settings)
    return Supervisor(node, node_name(settings), inventory, boot_id, stopping)
