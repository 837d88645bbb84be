"""Secrets of one home: made once, kept in files that only their owner can read."""

import os
import secrets
from pathlib import Path


def secret(file: Path, *, prefix: str = "") -> str:
    """The secret that stands in ``file``; made there where it is missing.

    43 url-safe characters, 256 bits, so that it needs no quoting in a URL.
    """
    try:
        if text := file.read_text(encoding="ascii").strip():
            return text
    except FileNotFoundError:
        pass
    made = prefix + secrets.token_urlsafe(32)
    write_private(file, made + "\n")
    return made


def write_private(file: Path, text: str) -> None:
    """Write a file of mode 0600 whole: aside, fsynced, then renamed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)
