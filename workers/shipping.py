"""Shipping what a runner wrote since the last time: checkpoints to the store, the rest to rows."""

from pathlib import Path

from sqlalchemy import Connection

from tuneyard.models import attempts, shipments
from tuneyard.models.artifacts import record_checkpoint
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.engine import Database
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.runner import Checkpoint, Sample, Warned
from tuneyard.store.remote import Store
from tuneyard.workers.publishing import store_folder
from tuneyard.workers.reading import read_files


def ship_new(db: Database, store: Store, ref: AttemptRef, workdir: Path) -> bool:
    """Ship what is new; whether anything was. Raises: StaleToken, Unavailable.

    Checkpoints and notes come before the offsets: if we die in between they come again, and a
    checkpoint that is stored twice is one.
    """
    with db.begin() as tx:
        offsets = shipments.offsets(tx, ref.id)
    reading = read_files(workdir, events_offset=offsets[0], log_offset=offsets[1])
    if (reading.events_offset, reading.log_offset) == offsets:
        return False
    for checkpoint in reading.checkpoints:
        _ship_checkpoint(db, store, ref, workdir, checkpoint)
    with db.begin() as tx:
        for each in reading.notes:
            _write_note(tx, ref, each)
        shipment = shipments.Shipment(
            reading.events_offset,
            reading.log_offset,
            reading.log,
            reading.metrics,
            reading.phase,
            reading.progress,
        )
        shipments.ship(tx, ref, shipment)
    return True


def _write_note(tx: Connection, ref: AttemptRef, event: Warned | Sample) -> None:
    attempts.note(tx, ref, event.type, event.model_dump(exclude={"v", "n", "t_mono", "type"}))


def _ship_checkpoint(
    db: Database, store: Store, ref: AttemptRef, workdir: Path, checkpoint: Checkpoint
) -> None:
    source = workdir / checkpoint.path
    try:
        folder = store_folder(store, ref, source, kind="checkpoint", step=checkpoint.step)
    except FileNotFoundError:
        return  # the runner let it go before we came to it: a newer one follows
    except (OSError, TuneyardError) as error:
        data = {"step": checkpoint.step, "message": str(error)}
        with db.begin() as tx:
            attempts.note(tx, ref, "checkpoint_rejected", data)
        return
    with db.begin() as tx:
        record_checkpoint(tx, ref, folder)
