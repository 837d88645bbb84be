"""Copying a runner's folders into the store, and recording them under the attempt's token."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid5

from sqlalchemy import Connection, select

from tuneyard.models.artifacts import StoredFolder, publish_base_model, publish_outputs
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.inputs import OUTPUTS
from tuneyard.models.tables import JobRow
from tuneyard.specs.runner import OUTPUT
from tuneyard.store.folder import manifest_digest
from tuneyard.store.remote import Shelf, Store


def store_folder(
    store: Store, ref: AttemptRef, source: Path, *, kind: str, step: int | None = None
) -> StoredFolder:
    """Copy a whole folder into the store, its hashes checked on the way.

    The id follows from attempt, kind and step: a worker that died after the copy finds its own.
    Raises: FileNotFoundError, OSError, FolderDamaged.
    """
    folder_id = uuid5(ref.id, f"{kind}:{step}")
    manifest = store.put_folder(source, shelf_of(kind), folder_id)
    size = sum(int(entry["size"]) for entry in manifest["files"])
    return StoredFolder(folder_id, kind, manifest, manifest_digest(manifest), size, step)


def shelf_of(kind: str) -> Shelf:
    """Base models belong to no team, so they stand apart."""
    return "models" if kind == "base_model" else "artifacts"


def publish(
    store: Store, ref: AttemptRef, kind: str, workdir: Path
) -> Callable[[Connection], None]:
    """Store WORKDIR/output; what is returned records it in the transaction that ends the attempt.

    A kind that brings nothing forth has none. Raises: OSError, FolderDamaged.
    """
    output = OUTPUTS.get(kind)
    if output is None:
        return lambda tx: None
    folder = store_folder(store, ref, workdir / OUTPUT, kind=output)
    if output != "base_model":
        return lambda tx: publish_outputs(tx, ref, [folder])

    def record(tx: Connection) -> None:
        name = tx.execute(
            select(JobRow.spec["model_name"].astext).where(JobRow.id == ref.job_id)
        ).scalar_one()
        publish_base_model(tx, name, folder)

    return record
