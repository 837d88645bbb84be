"""Folders that are whole or invisible: write aside, hash, fsync, rename.

A published folder holds ``manifest.json``: {"files": [{"path", "size", "sha256"}, …], …}. The same
content and the same meta give the same bytes, hence the same digest. Standard library alone:
runners, workers and the API use this.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuneyard.specs.errors import TuneyardError

MANIFEST_FILE = "manifest.json"
PIECE_BYTES = 1024**2

_SEGMENT = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")


class FolderDamaged(TuneyardError):
    """A file of this folder is missing, changed or not a plain file."""

    code = "folder_damaged"

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message, field=path)
        self.path = path


class FolderTaken(TuneyardError):
    """There is a folder of this name already."""

    code = "folder_taken"


def publish_folder(aside: Path, target: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Make ``aside`` durable, give it a manifest with ``meta``, rename it to ``target``.

    Both lie on one file system. A kill at any point leaves ``target`` whole or absent.
    Raises: FolderTaken, FolderDamaged (links, devices, unsafe names), OSError.
    """
    if target.exists():
        raise FolderTaken(f"{target.name} is there already.")
    names = sorted(_plain_files(aside))
    manifest = {"files": [_entry(aside, name) for name in names], **meta}
    _write_durably(aside / MANIFEST_FILE, manifest_bytes(manifest))
    _sync_folders(aside)
    os.rename(aside, target)
    _sync_folder(target.parent)
    return manifest


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one form in which a manifest is written."""
    return json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that names a folder's content: that of its manifest.json as we write it."""
    return hashlib.sha256(manifest_bytes(manifest)).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest, its shape and its names checked.

    Raises: FileNotFoundError, FolderDamaged.
    """
    return parse_manifest((folder / MANIFEST_FILE).read_bytes())


def parse_manifest(content: bytes) -> dict[str, Any]:
    """Read a manifest's bytes, its shape and its names checked. Raises: FolderDamaged."""
    try:
        manifest = json.loads(content)
        entries = [(e["path"], e["size"], e["sha256"]) for e in manifest["files"]]
    except (ValueError, KeyError, TypeError):
        raise FolderDamaged("manifest.json is not readable.", path=MANIFEST_FILE) from None
    for path, _, _ in entries:
        if not is_safe_name(path) or path == MANIFEST_FILE:
            raise FolderDamaged(f"manifest.json names {path!r}.", path=MANIFEST_FILE)
    return dict(manifest)


def verify_folder(folder: Path) -> dict[str, Any]:
    """Check that a folder holds what its manifest lists, byte for byte, and nothing else.

    Returns the manifest. Raises: FileNotFoundError (no manifest), FolderDamaged (names the file).
    """
    manifest = read_manifest(folder)
    listed = {entry["path"]: entry for entry in manifest["files"]}
    found = set(_plain_files(folder)) - {MANIFEST_FILE}
    for path in sorted(listed.keys() ^ found):
        what = "is missing" if path in listed else "is not in the manifest"
        raise FolderDamaged(f"{path} {what}.", path=path)
    for path, entry in listed.items():
        if _entry(folder, path, sync=False) != entry:
            raise FolderDamaged(f"{path} has changed.", path=path)
    return manifest


def copy_folder(source: Path, target: Path, *, aside: Path) -> dict[str, Any]:
    """Copy what a folder's manifest lists, checking every hash on the way; returns the manifest.

    Raises: FileNotFoundError (also when the source goes away meanwhile), FolderDamaged, OSError.
    """
    manifest = read_manifest(source)
    assemble_folder(manifest, lambda name: file_pieces(source / name), target, aside=aside)
    return manifest


def assemble_folder(
    manifest: Mapping[str, Any],
    pieces_of: Callable[[str], Iterable[bytes]],
    target: Path,
    *,
    aside: Path,
) -> None:
    """Write a folder from its files' pieces, wherever they come from; whole or not there at all.

    Raises: FolderDamaged when a file is not as the manifest says, and what ``pieces_of`` raises.
    """
    try:
        aside.mkdir(parents=True)
        for entry in manifest["files"]:
            _write_checked(aside, entry, pieces_of(entry["path"]))
        _write_durably(aside / MANIFEST_FILE, manifest_bytes(manifest))
        _sync_folders(aside)
        os.rename(aside, target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def checked(pieces: Iterable[bytes], entry: Mapping[str, Any]) -> Iterator[bytes]:
    """The same pieces; raises FolderDamaged instead of ending when they are not what is listed."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        yield piece
    if (size, digest.hexdigest()) != (entry["size"], entry["sha256"]):
        raise FolderDamaged(f"{entry['path']} has changed.", path=entry["path"])


def is_safe_name(path: object) -> bool:
    """Whether this is a relative path that stays inside its folder, on any machine.

    >>> [is_safe_name(p) for p in ("a/b.txt", "../a", "/a", "a//b", ".hidden", "a\\\\b", "")]
    [True, False, False, False, False, False, False]
    """
    if not isinstance(path, str) or ".." in path:
        return False
    return all(
        _SEGMENT.fullmatch(part) and not part.startswith(".") and len(part.encode()) <= 255
        for part in path.split("/")
    )


def _plain_files(folder: Path) -> Iterator[str]:
    """Relative names of all files below. Raises: FolderDamaged for what is not a plain file."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise FolderDamaged(f"{relative} is not a plain file.", path=relative)
            if not is_safe_name(relative):
                raise FolderDamaged(f"{relative!r} is not a safe name.", path=relative)
            if stat.S_ISREG(mode) and relative != MANIFEST_FILE:
                yield relative


def _entry(folder: Path, name: str, *, sync: bool = True) -> dict[str, Any]:
    handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"path": name, "size": os.fstat(file.fileno()).st_size, "sha256": digest}


def file_pieces(path: Path) -> Iterator[bytes]:
    """A plain file's bytes, about a mebibyte at a time; a link is not followed."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _write_checked(aside: Path, entry: Mapping[str, Any], pieces: Iterable[bytes]) -> None:
    path = aside / entry["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in checked(pieces, entry):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
