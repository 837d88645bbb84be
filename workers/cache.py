"""The node's cache: whole inputs by digest, shared by all attempts; what nobody uses goes first.

HOME/cache/<digest>          a folder with its manifest, or a file; whole or absent
HOME/cache/downloads/<key>   files on their way from a hub (runners/fetching.py)
HOME/cache/.locks/<name>     one lock an entry, which goes with the process that holds it
"""

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tuneyard.specs.runner import INPUTS, OUTPUT

log = logging.getLogger(__name__)

DOWNLOADS = "downloads"
ASIDE_AGE_S = 24 * 3600.0
DOWNLOAD_AGE_S = 7 * 24 * 3600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """Something that may leave the cache. used_at: Unix seconds of its last use."""

    path: Path
    bytes: int
    used_at: float

    @property
    def name(self) -> str:
        """Digest, or key of a download."""
        return self.path.name

    @property
    def digest(self) -> str | None:
        """What jobs know it by; None for what is only on its way."""
        return self.name if _DIGEST.fullmatch(self.name) else None


@contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """One at a time with one entry; the lock goes with the process that holds it."""
    with _lock_file(cache, name) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock_file(cache: Path, name: str) -> Iterator[int]:
    locks = cache / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("a") as file:
        yield file.fileno()


def adopt(cache: Path, folder: Path, digest: str) -> bool:
    """Let a whole folder that a runner made here become an entry, without a second copy.

    Whether it did: it does not where the disks differ or the entry is there.
    """
    with locked(cache, digest):
        target = cache / digest
        if target.exists():
            return False
        try:
            os.rename(folder, target)
        except OSError:
            return False
        folder.symlink_to(target)  # a worker that dies now publishes it once more
        os.utime(target)
        return True


def entries(cache: Path) -> list[Entry]:
    """All that is there, whole entries and downloads."""
    found = []
    for folder in (cache, cache / DOWNLOADS):
        for path in folder.iterdir() if folder.is_dir() else ():
            if folder.name == DOWNLOADS or _DIGEST.fullmatch(path.name):
                try:
                    found.append(Entry(path, _bytes_of(path), path.stat().st_mtime))
                except FileNotFoundError:
                    continue
    return found


def _bytes_of(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(
        os.lstat(os.path.join(parent, name)).st_size
        for parent, _, names in os.walk(path)
        for name in names
    )


def pinned(workdirs: Iterator[Path] | Sequence[Path]) -> set[str]:
    """Names of the entries that inputs of these work folders, or an adopted output, point to."""
    found = set()
    for workdir in workdirs:
        inputs = workdir / INPUTS
        links = [*(inputs.iterdir() if inputs.is_dir() else ()), workdir / OUTPUT]
        for link in links:
            if link.is_symlink():
                found.add(os.path.basename(os.readlink(link)))
    return found


def over(found: Sequence[Entry], *, max_bytes: int | None, pins: set[str]) -> list[Entry]:
    """What has to go so that the rest fits into ``max_bytes``: least recently used first."""
    if max_bytes is None:
        return []
    excess = sum(entry.bytes for entry in found) - max_bytes
    going = []
    for entry in in_order(found, pins=pins):
        if excess <= 0:
            break
        going.append(entry)
        excess -= entry.bytes
    return going


def in_order(found: Sequence[Entry], *, pins: set[str]) -> list[Entry]:
    """What may go at all, least recently used first."""
    free = [entry for entry in found if entry.name not in pins]
    return sorted(free, key=lambda entry: (entry.used_at, entry.name))


def make_room(
    cache: Path, *, wanted_bytes: int, max_bytes: int | None, pins: Callable[[], set[str]]
) -> list[Entry]:
    """Remove entries until so much disk is free and the cache is no larger than it may be.

    pins: names of what is in use, asked again under each entry's lock. Returns what went.
    """
    found = entries(cache)
    gone = [e for e in over(found, max_bytes=max_bytes, pins=pins()) if remove(cache, e, pins)]
    for entry in in_order([each for each in found if each not in gone], pins=pins()):
        if shutil.disk_usage(cache).free >= wanted_bytes:
            break
        if remove(cache, entry, pins):
            gone.append(entry)
    return gone


def sweep(cache: Path, *, pins: Callable[[], set[str]]) -> None:
    """Remove what died on its way: copies of a day ago, downloads that nobody went on with."""
    now = time.time()
    for path in cache.glob(".aside-*"):
        if now - path.lstat().st_mtime > ASIDE_AGE_S:
            _delete(path)
    for entry in entries(cache):
        if entry.digest is None and now - entry.used_at > DOWNLOAD_AGE_S:
            remove(cache, entry, pins)


def remove(cache: Path, entry: Entry, pins: Callable[[], set[str]]) -> bool:
    """Remove an entry, unless somebody holds its lock or uses it."""
    name = entry.name if entry.digest else f"folder-{entry.name}"
    with _lock_file(cache, name) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if entry.name in pins():
            return False
        away = cache / f".aside-{uuid4().hex}"
        try:
            os.rename(entry.path, away)
        except FileNotFoundError:
            return False
    _delete(away)
    fields = {"event": "cache_evicted", "entry": entry.name, "bytes": entry.bytes}
    log.info("cache entry removed", extra=fields)
    return True


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
