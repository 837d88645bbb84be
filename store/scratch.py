"""Folders for a moment, with an owner: what a killed process leaves, the next one removes."""

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


class Scratch:
    """ROOT/<owner>/… for this process, and ROOT/<owner>.lock, held for as long as it lives."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._mine: Path | None = None
        self._held = -1

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder that is gone after the block. Raises: OSError."""
        path = self._own() / uuid4().hex
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _own(self) -> Path:
        """Made at the first use: most processes need none."""
        with self._lock:
            if self._mine is None:
                self._root.mkdir(parents=True, exist_ok=True)
                with (self._root / ".lock").open("a") as gate:
                    # Between making a lock and taking it, another's sweep would find it free.
                    fcntl.flock(gate, fcntl.LOCK_EX)
                    self._sweep()
                    self._mine = self._root / uuid4().hex
                    self._held = _take(self._mine.with_suffix(".lock"))
                self._mine.mkdir()
            return self._mine

    def _sweep(self) -> None:
        for lock in self._root.glob("*.lock"):
            try:
                held = _take(lock)
            except BlockingIOError:
                continue  # its owner lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(held)


def _take(lock: Path) -> int:
    """Lock a file; the lock goes with the process. Raises: BlockingIOError."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    return handle
