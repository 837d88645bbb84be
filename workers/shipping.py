"""Shipping what a runner wrote since the last time: checkpoints to the store, the rest to rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneyard.models import attempts, shipments
from tuneyard.models.artifacts import record_checkpoint
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.engine import Database
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.runner import Checkpoint, Sample, Warned
from tuneyard.store.folder import MANIFEST_FILE, FolderDamaged
from tuneyard.store.remote import Store, StoreUnreachable
from tuneyard.workers.publishing import store_folder
from tuneyard.workers.reading import read_files


def ship_new(db: Database, store: Store | None, ref: AttemptRef, workdir: Path) -> bool:
    """Ship what is new; whether anything was. Raises: StaleToken, Unavailable, StoreUnreachable.

    Checkpoints come before the offsets: if we die in between they come again, and a checkpoint that
    is stored twice is one. All else goes in one transaction with the offsets. While the store is
    away metrics, log and progress go on; events are read again from the checkpoint on, as metrics
    that come twice are one as well. Without a store its checkpoints are given up, which a line of
    the timeline says.
    """
    with db.begin() as tx:
        offsets = shipments.offsets(tx, ref.id)
    reading = read_files(workdir, events_offset=offsets[0], log_offset=offsets[1])
    if (reading.events_offset, reading.log_offset) == offsets:
        return False
    away = _ship_checkpoints(db, store, ref, workdir, reading.checkpoints)
    with db.begin() as tx:
        shipment = shipments.Shipment(
            reading.events_offset if away is None else offsets[0],
            reading.log_offset,
            reading.log,
            reading.metrics,
            reading.phase,
            reading.progress,
            [(each.type, _told(each)) for each in reading.notes if away is None],
        )
        shipments.ship(tx, ref, shipment)
    if away is not None:
        raise away
    return True


def _told(event: Warned | Sample) -> dict[str, Any]:
    """What the timeline says of an event; its number and clock are the runner's own."""
    return event.model_dump(exclude={"v", "n", "t_mono", "type"})


def _ship_checkpoints(
    db: Database,
    store: Store | None,
    ref: AttemptRef,
    workdir: Path,
    checkpoints: Sequence[Checkpoint],
) -> StoreUnreachable | None:
    """Store and record checkpoints in order, until the store is found to be away."""
    for checkpoint in checkpoints:
        try:
            _ship_checkpoint(db, store, ref, workdir, checkpoint)
        except StoreUnreachable as away:
            return away
    return None


def _ship_checkpoint(
    db: Database, store: Store | None, ref: AttemptRef, workdir: Path, checkpoint: Checkpoint
) -> None:
    source = workdir / checkpoint.path
    try:
        _compare(source, checkpoint)
        if store is None:
            raise TuneyardError("The store was away for too long.")
        folder = store_folder(store, ref, source, kind="checkpoint", step=checkpoint.step)
    except FileNotFoundError:
        return  # the runner let it go before we came to it: a newer one follows
    except StoreUnreachable:
        raise
    except (OSError, TuneyardError) as error:
        data = {"step": checkpoint.step, "message": str(error)}
        with db.begin() as tx:
            attempts.note(tx, ref, "checkpoint_rejected", data)
        return
    with db.begin() as tx:
        record_checkpoint(tx, ref, folder)


def _compare(source: Path, checkpoint: Checkpoint) -> None:
    """Raises: FolderDamaged when the manifest is not the one that the runner announced."""
    found = hashlib.sha256((source / MANIFEST_FILE).read_bytes()).hexdigest()
    if found != checkpoint.manifest_sha256:
        raise FolderDamaged("its manifest is not the one that the runner announced")
