"""Making an attempt's work folder ready: inputs from the store by way of the node's cache."""

import errno
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, select

from tuneyard.models.artifacts import KeptCheckpoint, checkpoints_to_resume
from tuneyard.models.attempts import AttemptRef
from tuneyard.models.dependencies import spec_of
from tuneyard.models.tables import (
    AllocationRow,
    ArtifactRow,
    BaseModelRow,
    DeviceRow,
    FileRow,
    JobRow,
    SlotRow,
)
from tuneyard.specs.download import DownloadSpec
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.exits import Cause
from tuneyard.specs.ids import show_id
from tuneyard.specs.runner import (
    ATTEMPT_MARK,
    CHECKPOINTS,
    INPUTS,
    SPEC_FILE,
    RunnerSpec,
)
from tuneyard.specs.settings import Settings
from tuneyard.store.folder import FolderDamaged, read_manifest
from tuneyard.store.remote import Shelf, Store
from tuneyard.workers.cache import locked
from tuneyard.workers.hub_access import hub_environment
from tuneyard.workers.inventory import FAKE_FOLDER
from tuneyard.workers.tracker_access import tracker_environment


def cause_of(error: OSError) -> Cause:
    """Whether the disk is full, or something else keeps the store from us; neither is charged."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Cause.DISK_FULL if full else Cause.STORE_UNREACHABLE


@dataclass(frozen=True)
class StoredInput:
    """An input as the store has it: a folder on a shelf, or a file."""

    name: str
    shelf: Shelf | None
    id: UUID
    digest: str
    shown: str  # what manifests and configurations call it


class InputGone(TuneyardError):
    """An input of the job is not in the store any more. stored: which, where it has an id there."""

    code = "input_gone"
    stored: StoredInput | None = None


def _gone(stored: StoredInput, what: str) -> InputGone:
    gone = InputGone(f"{stored.name} {stored.shown} {what}")
    gone.stored = stored
    return gone


@dataclass(frozen=True)
class Errand:
    """All that the rows say about an attempt's work, read in one transaction."""

    ref: AttemptRef
    kind: str
    name: str
    seed: int
    arguments: Mapping[str, Any]
    device_kind: str
    device_uuids: tuple[str, ...]
    cores: tuple[int, ...]
    inputs: tuple[StoredInput, ...]
    checkpoints: tuple[KeptCheckpoint, ...]
    known: StoredInput | None = None  # what an earlier download of the same source brought


def read_errand(tx: Connection, ref: AttemptRef) -> Errand:
    """Read what an attempt is to do, with which devices, from which checkpoint."""
    job = tx.execute(
        select(JobRow.kind, JobRow.name, JobRow.spec, JobRow.inputs, JobRow.device_kind).where(
            JobRow.id == ref.job_id
        )
    ).one()
    spec = spec_of(job.spec)
    downloads = isinstance(spec, DownloadSpec)
    devices = tx.execute(
        select(DeviceRow.uuid, SlotRow.cores)
        .join(SlotRow, SlotRow.device_id == DeviceRow.id)
        .join(AllocationRow, AllocationRow.slot_id == SlotRow.id)
        .where(AllocationRow.attempt_id == ref.id)
        .order_by(DeviceRow.uuid)
    ).all()
    return Errand(
        ref=ref,
        kind=job.kind,
        name=job.name,
        seed=int(spec.arguments().get("seed") or 42),
        arguments=spec.arguments(),
        device_kind=job.device_kind,
        device_uuids=tuple(d.uuid for d in devices),
        cores=tuple(sorted({core for d in devices for core in d.cores})),
        inputs=tuple(_stored(tx, name, value) for name, value in job.inputs.items()),
        checkpoints=tuple(checkpoints_to_resume(tx, ref.job_id)),
        known=_known(tx, ref, job.spec) if downloads else None,
    )


def _known(tx: Connection, ref: AttemptRef, document: Mapping[str, Any]) -> StoredInput | None:
    """The newest that a download of the same source brought: its files need no second journey."""
    source = document["source"]
    if document.get("what") == "dataset":
        row = tx.execute(
            select(ArtifactRow.id, ArtifactRow.digest)
            .where(ArtifactRow.team_id == ref.team_id, ArtifactRow.kind == "dataset")
            .where(ArtifactRow.manifest["source"].astext == source)
            .order_by(ArtifactRow.published_at.desc())
            .limit(1)
        ).one_or_none()
        shelf: Shelf = "artifacts"
    else:
        row = tx.execute(
            select(BaseModelRow.id, BaseModelRow.digest)
            .where(BaseModelRow.source == source)
            .order_by(BaseModelRow.published_at.desc())
            .limit(1)
        ).one_or_none()
        shelf = "models"
    return StoredInput("known", shelf, row.id, row.digest, source) if row else None


def _stored(tx: Connection, name: str, value: Mapping[str, str]) -> StoredInput:
    ((kind, text),) = value.items()
    found = UUID(text)
    if kind == "base_model":
        row = tx.execute(
            select(BaseModelRow.name, BaseModelRow.digest).where(BaseModelRow.id == found)
        ).one()
        return StoredInput(name, "models", found, row.digest, row.name)
    if kind == "artifact":
        digest = tx.execute(select(ArtifactRow.digest).where(ArtifactRow.id == found)).scalar_one()
        return StoredInput(name, "artifacts", found, digest, show_id("artifact", found))
    sha256 = tx.execute(select(FileRow.sha256).where(FileRow.id == found)).scalar_one()
    return StoredInput(name, None, found, sha256, show_id("file", found))


def stage(
    errand: Errand,
    workdir: Path,
    store: Store,
    *,
    cache: Path,
    places: Mapping[str, Any] | None = None,
) -> list[str]:
    """Fill a work folder: inputs, checkpoint to resume from, spec.json.

    places: arguments of a download that say where things are on this node.
    Returns a sentence for each checkpoint that was rejected. Raises: InputGone, StoreUnreachable,
    OSError (this node's disk).
    """
    for folder in (INPUTS, CHECKPOINTS, "cwd"):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
    (workdir / INPUTS).chmod(0o755)
    paths = {each.name: _link(each, workdir, store, cache) for each in errand.inputs}
    if errand.known is not None:
        with suppress(InputGone):  # it would only have saved the way to the hub
            paths["known"] = _link(errand.known, workdir, store, cache)
    (workdir / INPUTS).chmod(0o555)
    resume, rejected = lay_checkpoints(errand.checkpoints, errand.arguments, workdir, store)
    spec = RunnerSpec(
        job=show_id("job", errand.ref.job_id),
        attempt=errand.ref.number,
        kind=errand.kind,
        seed=errand.seed,
        device="gpu" if errand.device_kind == "gpu" else "cpu",
        resume=str(resume) if resume else None,
        inputs={name: str(path) for name, path in paths.items()},
        input_ids={each.name: each.shown for each in errand.inputs},
        input_digests={each.name: each.digest for each in errand.inputs},
        arguments={**errand.arguments, **(places or {})},
    )
    (workdir / SPEC_FILE).write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    return rejected


def _link(stored: StoredInput, workdir: Path, store: Store, cache: Path) -> Path:
    """Put an input into the cache, if it is not there, and link it into the work folder."""
    entry = cache / f"{stored.digest}"
    link = workdir / INPUTS / stored.name
    try:
        with locked(cache, stored.digest):
            if not entry.exists():
                _fetch(stored, entry, store, cache)
            os.utime(entry)
            # Within the lock: from here on the link keeps the entry from being removed.
            link.unlink(missing_ok=True)
            link.symlink_to(entry)
    except FileNotFoundError:
        raise _gone(stored, "is not in the store any more.") from None
    except FolderDamaged as error:
        raise _gone(stored, f"is damaged in the store: {error.message}") from None
    return link


def remove_work(workdir: Path) -> None:
    """Remove a work folder, whose inputs/ may not be written."""
    try:
        (workdir / INPUTS).chmod(0o755)
    except OSError:
        pass
    shutil.rmtree(workdir, ignore_errors=True)


def _fetch(stored: StoredInput, entry: Path, store: Store, cache: Path) -> None:
    """Bring an input into the cache. Runners share it: its files are there to be read alone."""
    aside = cache / f".aside-{uuid4().hex}"
    if stored.shelf is not None:
        store.fetch_folder(stored.shelf, stored.id, entry, digest=stored.digest, aside=aside)
        for path in entry.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
        return
    try:
        if store.fetch_file(stored.id, aside) != stored.digest:
            raise FolderDamaged("its sha256 is another")
        aside.chmod(0o444)
        os.rename(aside, entry)
    finally:
        aside.unlink(missing_ok=True)


def lay_checkpoints(
    checkpoints: Sequence[KeptCheckpoint],
    arguments: Mapping[str, Any],
    workdir: Path,
    store: Store,
) -> tuple[Path | None, list[str]]:
    """Copy the newest recorded checkpoint whose hashes agree; older ones stand in for it.

    The best that it knows of is laid beside it where that may become the job's result.
    """
    rejected: list[str] = []
    for checkpoint in checkpoints:
        target = _copy_checkpoint(checkpoint, workdir, store, rejected)
        if target is None:
            continue
        if arguments.get("load_best_model_at_end"):
            wanted = read_manifest(target).get("best_step")
            best = next((each for each in checkpoints if each.step == wanted), checkpoint)
            _copy_checkpoint(best, workdir, store, rejected)
        return target, rejected
    return None, rejected


def _copy_checkpoint(
    checkpoint: KeptCheckpoint, workdir: Path, store: Store, rejected: list[str]
) -> Path | None:
    """One checkpoint from the store; None, and a sentence in ``rejected``, where it is no good."""
    target = workdir / "resume" / f"step-{checkpoint.step}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = workdir / f".aside-{uuid4().hex}"
    try:
        store.fetch_folder(
            "artifacts", checkpoint.id, target, digest=checkpoint.digest, aside=aside
        )
    except FileNotFoundError:
        rejected.append(f"checkpoint of step {checkpoint.step} rejected: it is gone")
        return None
    except FolderDamaged as error:
        rejected.append(f"checkpoint of step {checkpoint.step} rejected: {error}")
        return None
    return target


RUNNER_MODULES = {
    "finetune": "tuneyard.runners.finetune",
    "inference": "tuneyard.runners.infer",
    "evaluate": "tuneyard.runners.evaluate",
    "merge": "tuneyard.runners.merge",
    "download": "tuneyard.runners.download",
    "prepare": "tuneyard.runners.prepare",
    "serve": "tuneyard.runners.serve",
}

PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "TMPDIR")
"""What a runner keeps of the worker's environment; nothing of it is a secret."""


def runner_command(
    errand: Errand, workdir: Path, settings: Settings
) -> tuple[list[str], dict[str, str]]:
    """The runner's command line and its whole environment."""
    python = settings.runner_python or sys.executable
    module = RUNNER_MODULES[errand.kind]
    argv = [python, "-P", "-m", module, str(workdir / SPEC_FILE), str(workdir)]
    hub = hub_environment(os.environ, settings.home) if errand.kind == "download" else {}
    trackers = tracker_environment(os.environ, settings, errand.arguments)
    gpus = errand.device_uuids if errand.device_kind == "gpu" else ()
    threads = 1 if settings.fake_gpus else max(1, len(errand.cores))
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {
        ATTEMPT_MARK: show_id("attempt", errand.ref.id),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(workdir),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.fake_gpus:
        environment["TUNEYARD_FAKE_GPUS"] = str(settings.home / FAKE_FOLDER)
    return argv, environment | hub | trackers
