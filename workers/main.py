"""The worker's process: the supervisor first, then Celery in the main thread."""

import ctypes
import fcntl
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from celery import Celery
from celery.platforms import EX_OK
from celery.worker import state

from tuneyard.models.nodes import Gateway
from tuneyard.specs.beats import beat
from tuneyard.specs.errors import InputError, Unavailable
from tuneyard.specs.messages import node_queue
from tuneyard.specs.settings import Settings
from tuneyard.workers.observing import Observers, celery_app, hostname_of
from tuneyard.workers.relaying import open_relay
from tuneyard.workers.supervisor import Supervisor, register
from tuneyard.workers.watching import ConsumerWatch

log = logging.getLogger(__name__)

RECONNECT_S = 1.0

PR_SET_DUMPABLE = 4


def run(settings: Settings) -> None:
    """Serve this node until SIGTERM. Raises: InputError when another worker serves this home."""
    stop = threading.Event()
    _stop_on_signals(stop)
    # Runners may have the worker's uid: they shall not read its environment and memory.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    with _alone(settings.home):
        relay = open_relay(settings)
        supervisor = _register(settings, stop, Gateway(relay.url, relay.token))
        if supervisor is None:
            return
        supervisor.start()
        relay.start(stop)
        log.info("worker ready", extra={"event": "worker_ready", "node": str(supervisor.node.id)})
        silent = _consume(settings, supervisor, stop)
        supervisor.shut_down(keep_runners=settings.keep_runners or silent)
        supervisor.node.db.close()


def _stop_on_signals(stop: threading.Event) -> None:
    """Heed SIGTERM and SIGINT while Celery has not set handlers of its own, or no more."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        # A consumer that is only starting looks here before it takes its first message.
        state.should_stop = EX_OK

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, handle)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the home's lock: two workers on one home would take each other's attempts for dead."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "worker.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another worker serves {home}.",
                code="already_running",
                hint="one worker serves a node; set TUNEYARD_HOME for a second node",
            ) from None
        yield


def _register(settings: Settings, stop: threading.Event, gateway: Gateway) -> Supervisor | None:
    """Register with the database, waiting for it as long as it takes; None when asked to stop."""
    said = False
    while not stop.is_set():
        beat(settings, "worker")
        try:
            return register(settings, {"tuneyard": version("tuneyard")}, stop, gateway)
        except Unavailable as error:
            if not said:
                log.warning(error.message, extra={"event": "database_away", "code": error.code})
            said = True
            stop.wait(RECONNECT_S)
    return None


def _consume(settings: Settings, supervisor: Supervisor, stop: threading.Event) -> bool:
    """Run Celery until SIGTERM; a consumer that breaks is made anew, the supervisor goes on.

    Returns whether it ended because its consumer had fallen silent.
    """
    app = celery_app(settings.broker_url.get_secret_value(), supervisor.node.id)
    Observers(app, supervisor)
    watch = ConsumerWatch(app, node_queue(supervisor.node.id))
    watch.start(stop)
    while not stop.is_set():
        _stop_on_signals(stop)
        try:
            _work(app, supervisor, settings)
        except SystemExit:
            pass
        except Exception as error:
            fields = {"event": "consumer_broke", "error": repr(error)}
            log.warning("consumer broke: %r", error, extra=fields)
        stop.wait(RECONNECT_S)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    return watch.silent


def _work(app: Celery, supervisor: Supervisor, settings: Settings) -> None:
    threads = settings.cpu_slots + len(supervisor.inventory.gpus()) + 4
    worker = app.Worker(
        concurrency=threads,
        hostname=hostname_of(supervisor),
        loglevel=settings.log_level,
        pool="threads",
        without_gossip=True,
        without_mingle=True,
    )
    worker.start()
