"""Bringing a hub's files to this node: one at a time, gone on with, hashed, never half.

    CACHE/downloads/KEY/…     files of one commit, as far as they are there; KEY names what they are
    CACHE/.locks/download-…   held by the process that brings them; it goes with the process

What the node has already, in the caches of the hubs' own clients or from an earlier download, is
linked in after its hash was checked. Nothing leaves the folder but by ``verified``.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.failures import NoRoom
from tuneyard.runners.hub_errors import unreachable
from tuneyard.runners.listings import Listing, RemoteFile
from tuneyard.specs.sources import HUB_NAMES

LOOK_EVERY_S = 0.5
SHOW_LIFE_EVERY_S = 60.0
ROUNDS = 2

Fetch = Callable[[Listing, Sequence[RemoteFile], Path], None]


@dataclass(frozen=True)
class Place:
    """Where a node keeps what it downloads.

    floor_bytes stay free; copied: the store lies on this disk too, so that all is written twice.
    """

    cache: Path
    floor_bytes: int = 0
    copied: bool = False
    stall_s: float = 300.0

    def folder(self, listing: Listing) -> Path:
        """Of the files of one commit."""
        name = json.dumps([listing.hub, listing.what, listing.repo, listing.commit])
        return self.cache / "downloads" / hashlib.sha256(name.encode()).hexdigest()[:32]


@contextmanager
def alone(place: Place, source: str, attempt: Attempt) -> Iterator[None]:
    """Be the only one of this node who downloads a source; others wait and find it there."""
    name = "download-" + hashlib.sha256(source.encode()).hexdigest()[:32]
    with _lock_file(place.cache, name) as file:
        shown_at = -SHOW_LIFE_EVERY_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - shown_at > SHOW_LIFE_EVERY_S:
                    shown_at = time.monotonic()
                    attempt.events.warn("waits_for_download", f"{source} is being downloaded here.")
                time.sleep(LOOK_EVERY_S)
        yield


@contextmanager
def holding(folder: Path, cache: Path) -> Iterator[None]:
    """Keep a folder of downloads from being removed to make room."""
    with _lock_file(cache, f"folder-{folder.name}") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        yield


@contextmanager
def _lock_file(cache: Path, name: str) -> Iterator[IO[str]]:
    locks = cache / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("a") as file:
        yield file


def bring(
    listing: Listing,
    files: Sequence[RemoteFile],
    place: Place,
    *,
    fetch: Fetch,
    had: Callable[[RemoteFile], Iterator[Path]],
    attempt: Attempt,
) -> Path:
    """Have all these files, verified, in one folder, which the caller holds.

    had: paths at which a file may stand on this node already.
    Raises: NoRoom, HubUnreachable, BadSpec.
    """
    folder = place.folder(listing)
    total = sum(file.size for file in files)
    missing = [file for file in files if not verified(file, folder)]
    missing = [file for file in missing if not adopt(file, folder / file.path, had(file))]
    adopted = total - sum(file.size for file in missing)
    _report(attempt, adopted, total)
    for _ in range(ROUNDS):
        if not missing:
            break
        check_room(listing, missing, place, total=total, there=_bytes_in(folder) - adopted)
        work = partial(fetch, listing, missing, folder)
        _watched(work, folder, total, place, attempt)
        missing = [file for file in missing if not verified(file, folder)]
    if missing:
        reason = f"the bytes of {missing[0].path} of {listing.repo} are not those that it lists"
        raise unreachable(HUB_NAMES[listing.hub], reason)
    return folder


def verified(file: RemoteFile, folder: Path) -> bool:
    """Whether a file is there with the bytes that its hub lists; one with other bytes goes."""
    path = folder / file.path
    if file.is_at(path):
        return True
    path.unlink(missing_ok=True)
    return False


def adopt(file: RemoteFile, target: Path, had: Iterator[Path]) -> bool:
    """Link a file in that stands elsewhere on this node, if its hash is right."""
    for path in had:
        if (file.sha256 or file.git_sha1) and file.is_at(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            link(path, target)
            return True
    return False


def link(path: Path, target: Path) -> None:
    """A second name for a file's bytes; a copy where the disks differ or links are forbidden."""
    try:
        os.link(os.path.realpath(path), target)
    except OSError:
        shutil.copyfile(path, target)


def check_room(
    listing: Listing, missing: Sequence[RemoteFile], place: Place, *, total: int, there: int
) -> None:
    """Compare what is to come with what is free, before a byte is asked for. Raises: NoRoom."""
    needed = sum(file.size for file in missing) - there + (total if place.copied else 0)
    free = shutil.disk_usage(place.cache).free - place.floor_bytes
    if needed > free:
        raise NoRoom(
            f"{listing.shown} needs {_shown(needed)}, and {_shown(max(0, free))} are free in"
            f" {place.cache} above the floor of {_shown(place.floor_bytes)}.",
            field="source",
            hint="free some disk, or lower disk_floor_bytes; what nobody uses leaves the cache",
        )


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _watched(
    work: Callable[[], None], folder: Path, total: int, place: Place, attempt: Attempt
) -> None:
    """Do the work in a thread of its own, tell its progress, and give up when no bytes come.

    The client may hang in its own threads: those are daemons here, and end with the process.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    began, first = time.monotonic(), _bytes_in(folder)
    most, grown_at, said_at = first, began, began
    while thread.is_alive():
        thread.join(LOOK_EVERY_S)
        now, there = time.monotonic(), _bytes_in(folder)
        if there > most:
            most, grown_at = there, now
        if now - said_at > 2 * LOOK_EVERY_S:
            said_at = now
            rate = (there - first) / (now - began)
            eta_s = (total - there) / rate if rate > 0 and there < total else None
            _report(attempt, min(there, total), total, eta_s)
        if now - grown_at > place.stall_s:
            raise unreachable("The hub", f"no byte came for {place.stall_s:g} s")
    if failed:
        raise failed[0]
    _report(attempt, min(_bytes_in(folder), total), total)


def _report(attempt: Attempt, done: int, total: int, eta_s: float | None = None) -> None:
    attempt.events.emit("progress", done=done, total=total, unit="bytes", eta_s=eta_s)


def _bytes_in(folder: Path) -> int:
    """Bytes of all files below, partial ones included."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # renamed meanwhile
    return found
