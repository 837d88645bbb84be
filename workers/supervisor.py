"""The node's supervisor: asks Postgres what is placed here, keeps it, renews, clears devices.

It runs before Celery consumes and needs none of it: hints and NOTIFY only make it look sooner.
"""

import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from uuid import UUID, uuid4

from tuneyard.models import attempts, node_cache, nodes
from tuneyard.models.engine import Database
from tuneyard.models.events import node_channel
from tuneyard.specs.beats import beat
from tuneyard.specs.errors import BadId, StaleToken, Unavailable
from tuneyard.specs.exits import Cause, Outcome, StopReason, Verdict
from tuneyard.specs.ids import parse_id, show_id
from tuneyard.specs.settings import Settings
from tuneyard.store.remote import open_store
from tuneyard.store.scratch import Scratch
from tuneyard.workers import cache
from tuneyard.workers.archiving import LogArchiver
from tuneyard.workers.guarding import boottime, kill_marked, marked_attempts, node_identity
from tuneyard.workers.inventory import Inventory, inventory_of, node_name, offered_devices
from tuneyard.workers.keeping import HELD_TOO_LONG_S, Keeper, Node
from tuneyard.workers.sweeping import Sweeper

log = logging.getLogger(__name__)

SEEN_EMPTY = 2
"""So many looks in a row must find a GPU empty."""

CLEAR_EVERY_S = 0.25


@dataclass
class Supervisor:
    """All attempts of one node."""

    node: Node
    name: str
    inventory: Inventory
    boot_id: str  # machine's boot / home: one life of this node
    stopping: threading.Event  # nothing is claimed any more
    keepers: dict[UUID, Keeper] = field(default_factory=dict)
    woken: threading.Event = field(default_factory=threading.Event)
    on_end: Callable[[Keeper], None] = lambda keeper: None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _empty_looks: dict[UUID, int] = field(default_factory=dict)
    _cached: Mapping[str, int] | None = None
    """Digest -> bytes of what is cached, as the database was told; None: not yet."""
    _cached_names: set[str] = field(default_factory=set)
    _room_wanted: int = 0  # bytes that a download lacked
    _disk_low: bool | None = None

    @cached_property
    def sweeper(self) -> Sweeper:
        """The housekeeping beside it."""
        node = self.node
        archiver = LogArchiver(
            node.db, node.store, node.id, Scratch(node.settings.home / "scratch")
        )
        return Sweeper(
            node.db, node.store, node.settings.home, archiver, self._live_folders, self._pinned
        )

    def _live_folders(self) -> set[str]:
        return {show_id("attempt", keeper.ref.id) for keeper in self._live()}

    def start(self) -> None:
        """Look once, so that what runs already is kept again, then go on in threads."""
        self.look()
        for task in (self._look_often, self._renew_often, self._listen, self._clear_often):
            threading.Thread(target=task, name=task.__name__.strip("_"), daemon=True).start()
        threading.Thread(
            target=self.sweeper.run, args=(self.stopping,), name="sweep", daemon=True
        ).start()

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
        with self._lock:  # what is being claimed meanwhile sees ``stopping`` under it
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
                    attempts.note_shutdown(tx, keeper.ref)
            except Unavailable:
                pass  # unasked, its end counts as lease_fenced, which is uncharged too
            keeper.stop(StopReason.SHUTDOWN)

    # Looking -----------------------------------------------------------------------------------

    def _look_often(self) -> None:
        while not self.stopping.is_set():
            beat(self.node.settings, "worker")
            try:
                self.look()
                self.keep_cache()
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
        self._forget_the_done()
        for assignment in placed:
            keeper = self.keeper_of(assignment.ref.id) or self._take(assignment, requested_at)
            if keeper is not None and assignment.stop_reason is not None:
                keeper.stop(assignment.stop_reason)

    def _forget_the_done(self) -> None:
        with self._lock:
            done = [keeper for keeper in self.keepers.values() if keeper.done.is_set()]
            for keeper in done:
                del self.keepers[keeper.ref.id]
        for keeper in done:
            if keeper.verdict is not None and keeper.verdict.cause is Cause.DISK_FULL:
                self._room_wanted = max(self._room_wanted, 2 * keeper.wanted_bytes)
            self.on_end(keeper)
            self.sweeper.wake()

    def _take(self, assignment: attempts.Assignment, requested_at: float) -> Keeper | None:
        """Claim a new attempt, or take one up again that an earlier worker had claimed here.

        One that was claimed from another home is not ours to start: its lease will run out.
        """
        claimed = assignment.claimed_by is not None
        if claimed and home_of(assignment.claimed_by) != home_of(self.boot_id):
            return None
        if self.stopping.is_set() or not (claimed or self._claim(assignment.ref)):
            return None
        if claimed:
            # The lease that an earlier worker left may be nearly over: renew before trusting it.
            requested_at = boottime()
            with self.node.db.begin_reserved() as tx:
                renewed = attempts.renew_leases(
                    tx, [assignment.ref], self.node.id, lease_s=self.node.settings.lease_s
                )
            if not renewed:
                return None
        keeper = Keeper(self.node, assignment, renewed_at=requested_at)
        with self._lock:
            if not self.stopping.is_set():
                self.keepers[assignment.ref.id] = keeper
                keeper.start()
                return keeper
        if not claimed:
            self._give_back(assignment.ref)
        return None

    def _give_back(self, ref: attempts.AttemptRef) -> None:
        """End an attempt that was claimed while the worker began to stop: nothing runs yet."""
        end = attempts.End(Verdict(Outcome.STOPPED), "the worker stops")
        with self.node.db.begin() as tx:
            attempts.note_shutdown(tx, ref)
            attempts.finish_attempt(tx, ref, end)

    def _claim(self, ref: attempts.AttemptRef) -> bool:
        if self._disk_is_low():
            self.keep_cache()
            if self._disk_is_low():
                self._send_back(ref)
                return False
        with self.node.db.begin() as tx:
            return attempts.claim(
                tx, ref, self.node.id, boot_id=self.boot_id, lease_s=self.node.settings.lease_s
            )

    def _send_back(self, ref: attempts.AttemptRef) -> None:
        """Give a placement back at once, and say why; nothing more is placed while it is so."""
        settings = self.node.settings
        free = shutil.disk_usage(settings.home).free
        evidence = (
            f"{self.name} has {free / 1e9:.1f} GB of free disk, less than its floor of"
            f" {settings.disk_floor_bytes / 1e9:.1f} GB (disk_floor_bytes)."
        )
        log.warning(evidence, extra={"event": "disk_low", "free_bytes": free})
        end = attempts.End(Verdict(Outcome.LOST, Cause.DISK_LOW), evidence)
        with self.node.db.begin() as tx:
            try:
                attempts.finish_attempt(tx, ref, end, backoff_s=settings.retry_backoff_s)
            except StaleToken:
                pass  # over meanwhile

    # The cache -----------------------------------------------------------------------------------

    def keep_cache(self) -> None:
        """Let go what is too much, and keep the database's view of cache and disk in step."""
        cached = self._record_cache()
        most = self.node.settings.cache_max_bytes
        too_full = most is not None and sum(cached.values()) > most
        if (too_full or self._room_wanted or self._disk_is_low()) and self._make_room():
            self._record_cache()
        low = self._disk_is_low()
        if low != self._disk_low:
            with self.node.db.begin() as tx:
                node_cache.set_disk_low(tx, self.node.id, low)
            self._disk_low = low

    def _make_room(self) -> bool:
        """Whether anything went."""
        settings = self.node.settings
        wanted, self._room_wanted = settings.disk_floor_bytes + self._room_wanted, 0
        gone = cache.make_room(
            self.node.cache,
            wanted_bytes=wanted,
            max_bytes=settings.cache_max_bytes,
            pins=self._pinned,
        )
        return bool(gone)

    def _pinned(self) -> set[str]:
        """What live attempts use."""
        return cache.pinned([self.node.workdir(keeper.ref) for keeper in self._live()])

    def _record_cache(self) -> Mapping[str, int]:
        """Tell the database of what came and went; what is there now."""
        names = {path.name for path in self.node.cache.iterdir()}
        if self._cached is not None and names == self._cached_names:
            return self._cached
        there = {e.digest: e.bytes for e in cache.entries(self.node.cache) if e.digest}
        known = self._cached
        with self.node.db.begin() as tx:
            if known is None:
                node_cache.replace_cached(tx, self.node.id, there)
            else:
                new = {digest: size for digest, size in there.items() if digest not in known}
                node_cache.add_cached(tx, self.node.id, new)
                node_cache.drop_cached(tx, self.node.id, known.keys() - there.keys())
        self._cached, self._cached_names = there, names
        return there

    def _disk_is_low(self) -> bool:
        settings = self.node.settings
        return shutil.disk_usage(settings.home).free < settings.disk_floor_bytes

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
            nodes.report_alive(tx, self.node.id)
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
        # After ``cleaning`` alone is it known that every process is gone.
        doubtful = any(device.state != "cleaning" for device in held)
        left = self.kill_ended() if doubtful else set()
        for device in held:
            state = self._judge_device(device, gone=device.state == "cleaning" or not left)
            if state is not None:
                with self.node.db.begin() as tx:
                    nodes.set_device_state(tx, device, state)

    def _judge_device(self, device: nodes.HeldDevice, *, gone: bool) -> str | None:
        empty = gone and (device.kind == "cpu" or self.inventory.is_empty(device.uuid))
        looks = self._empty_looks.get(device.id, 0) + 1 if empty else 0
        self._empty_looks[device.id] = looks
        if looks >= SEEN_EMPTY or (empty and device.kind == "cpu"):
            del self._empty_looks[device.id]
            return "ok"
        gpu = device.kind == "gpu"
        if gpu and device.state != "draining" and device.seconds > HELD_TOO_LONG_S:
            log.warning("GPU stays held", extra={"event": "gpu_draining", "gpu": device.uuid})
            return "draining"
        return None

    def kill_ended(self) -> set[int]:
        """Kill what bears the mark of an attempt that is over; the pids that are there still."""
        marked: dict[UUID, str] = {}
        for text in marked_attempts():
            try:
                marked[parse_id("attempt", text)] = text
            except BadId:
                continue
        with self.node.db.begin() as tx:
            ended = nodes.ended_among(tx, list(marked))
        return kill_marked({marked[each] for each in ended})


def home_identity(home: Path) -> str:
    """What names this home wherever it is mounted; made by its first worker."""
    file = home / "home_id"
    if not file.exists():
        aside = home / ".home_id"
        aside.write_text(uuid4().hex, encoding="ascii")
        os.rename(aside, file)
    return file.read_text(encoding="ascii")


def home_of(boot_id: str | None) -> str:
    """The home's part of a life's name."""
    return (boot_id or "").rpartition("/")[2]


def register(
    settings: Settings,
    capabilities: Mapping[str, object],
    stopping: threading.Event,
    gateway: nodes.Gateway | None = None,
) -> Supervisor:
    """Write this node and its devices into the database.

    Raises: Unavailable, NodeTaken, InputError (the store cannot be used).
    """
    store = open_store(settings)
    db = Database(settings.database_url.get_secret_value(), f"ty-worker@{node_name(settings)}")
    for folder in ("work", "cache"):
        (settings.home / folder).mkdir(parents=True, exist_ok=True)
    inventory = inventory_of(settings)
    boot_id = f"{node_identity().boot_id}/{home_identity(settings.home)}"
    try:
        with db.begin() as tx:
            node_id = nodes.register_node(
                tx,
                node_name(settings),
                boot_id=boot_id,
                capabilities=dict(capabilities),
                devices=offered_devices(inventory, settings.cpu_slots),
                lease_s=settings.lease_s,
                gateway=gateway,
            )
    except BaseException:
        db.close()
        raise
    node = Node(node_id, db, store, settings)
    return Supervisor(node, node_name(settings), inventory, boot_id, stopping)
