"""Copying a runner's folders into the store, and recording them under the attempt's token."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import Connection, select

from tuneyard.models.artifacts import StoredFolder, publish_base_model, publish_outputs
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.inputs import OUTPUTS, output_of
from tuneyard.models.tables import JobRow
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.ids import show_id
from tuneyard.specs.runner import OUTPUT, REPORTS, SPEC_FILE, RunnerSpec
from tuneyard.store.folder import FolderDamaged, manifest_digest, read_manifest
from tuneyard.store.remote import Shelf, Store

log = logging.getLogger(__name__)


def store_folder(
    store: Store,
    ref: AttemptRef,
    source: Path,
    *,
    kind: str,
    step: int | None = None,
    recorded: UUID | None = None,
) -> StoredFolder:
    """Copy a whole folder into the store, its hashes checked on the way.

    The id follows from attempt, kind, step and content: a worker that died after the copy finds
    its own, and two contents never meet under one id.
    recorded: the id that this content has already; what is there under it is not copied again.
    Raises: FileNotFoundError, OSError, FolderDamaged, StoreUnreachable.
    """
    digest = manifest_digest(read_manifest(source))
    folder_id = recorded or uuid5(ref.id, f"{kind}:{step}:{digest}")
    manifest = store.put_folder(source, shelf_of(kind), folder_id)
    size = sum(int(entry["size"]) for entry in manifest["files"])
    return StoredFolder(folder_id, kind, manifest, digest, size, step)


def shelf_of(kind: str) -> Shelf:
    """Base models belong to no team, so they stand apart."""
    return "models" if kind == "base_model" else "artifacts"


class OutputNotWhole(TuneyardError):
    """The runner said that it is done, and left no whole output."""

    code = "output_not_whole"


def _check_whole(output: Path) -> None:
    """Every byte is compared when it is copied; this tells a runner's fault from the store's."""
    try:
        files = read_manifest(output)["files"]
    except (FileNotFoundError, FolderDamaged):
        raise OutputNotWhole("The runner ended with 0 and left no whole output.") from None
    for entry in files:
        if not (output / entry["path"]).is_file():
            raise OutputNotWhole(f"The runner ended with 0 without {entry['path']} in its output.")


def publish(
    store: Store,
    ref: AttemptRef,
    kind: str,
    workdir: Path,
    *,
    recorded: Callable[[str], UUID | None],
) -> tuple[StoredFolder | None, Callable[[Connection], None]]:
    """Store WORKDIR/output; what is returned records it in the transaction that ends the attempt.

    recorded: digest of a base model -> the id that it is recorded under by the job's name for it.
    A kind that brings nothing forth has no folder. Raises: OutputNotWhole, OSError,
    StoreUnreachable.
    """
    if kind not in OUTPUTS:
        return None, lambda tx: None
    output = output_of(kind, _arguments(workdir))
    _check_whole(workdir / OUTPUT)
    try:
        source = workdir / OUTPUT
        known = recorded(manifest_digest(read_manifest(source))) if output == "base_model" else None
        folder = store_folder(store, ref, source, kind=output, recorded=known)
    except FolderDamaged as error:
        raise OutputNotWhole(f"The runner's output is not whole: {error.message}") from None
    if output != "base_model":
        folders = [folder, *_reports(store, ref, workdir / REPORTS)]
        return folder, lambda tx: publish_outputs(tx, ref, folders)

    def record(tx: Connection) -> None:
        name = tx.execute(
            select(JobRow.spec["model_name"].astext).where(JobRow.id == ref.job_id)
        ).scalar_one()
        publish_base_model(tx, name, folder)

    return folder, record


def _reports(store: Store, ref: AttemptRef, source: Path) -> Iterator[StoredFolder]:
    """What trackers wrote, if they did; no result depends on it. Raises: StoreUnreachable."""
    if not source.is_dir():
        return
    try:
        yield store_folder(store, ref, source, kind=REPORTS)
    except (OSError, FolderDamaged) as error:
        fields = {"event": "reports_lost", "attempt": show_id("attempt", ref.id)}
        log.warning("reports not kept: %s", error, extra=fields)


def _arguments(workdir: Path) -> dict[str, Any]:
    """What the runner was asked for."""
    spec = RunnerSpec.model_validate_json((workdir / SPEC_FILE).read_bytes())
    return spec.arguments
