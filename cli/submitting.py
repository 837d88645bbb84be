"""From a file on the client's disk to a submission: paths in it are the client's, and go along."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneyard.client import Client
from tuneyard.specs.documents import apply_overrides, read_json, read_yaml
from tuneyard.specs.errors import InputError, SpecRejected

MAX_DOCUMENT_BYTES = 2 * 1024**2
CHECK_WITHIN_S = 10.0
FILES = {"dataset": "dataset", "eval_dataset": "dataset", "prompts": "prompts"}
"""Field -> purpose of the file that it names."""


def read_document(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a YAML or JSON file, or stdin for ``-``. Raises: InputError that names it."""
    text = _read(name)
    document = read_json(text) if name.endswith(".json") else read_yaml(text)
    document = apply_overrides(document, overrides)
    if name != "-" and not document.get("name") and "kind" in document | {"kind": None}:
        document.setdefault("name", Path(name).stem)
    return document


def _read(name: str) -> bytes:
    if name == "-":
        if sys.stdin.isatty():
            raise InputError("`-` reads stdin, and nothing is piped in.", code="no_input")
        return sys.stdin.buffer.read(MAX_DOCUMENT_BYTES)
    path = Path(name)
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            message = f"{name} is larger than 2 MiB: that is no job."
            raise InputError(message, code="too_large", hint="data goes by `tuneyard files put`")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.", code="no_file") from None
    if not content.strip():
        raise InputError(f"{name} is empty.", code="empty_file")
    return content


def upload_inputs(client: Client, document: dict[str, Any], base: Path) -> dict[str, Any]:
    """Upload the local files that a document names, and name their ids instead."""
    changed = dict(document)
    for field, purpose in FILES.items():
        value = document.get(field)
        path = local_file(value, base) if isinstance(value, str) else None
        if path is not None:
            changed[field] = upload(client, path, purpose=purpose)
    return changed


def local_file(value: str, base: Path) -> Path | None:
    """The file that a value names, beside the document first, then here; None: it is no path."""
    if value.startswith("file_") or "\x00" in value or len(value) > 4000:
        return None
    for folder in (base, Path.cwd()):
        path = folder / Path(value).expanduser()
        if path.is_file():
            return path
    if "/" in value or value.endswith((".json", ".jsonl", ".txt")):
        message = f"{value} is no file, neither beside the document nor here."
        raise InputError(message, code="no_file", hint="name a file, or the id of an upload")
    return None


def upload(client: Client, path: Path, *, purpose: str) -> str:
    """Upload a file and wait a moment for its check. Raises: SpecRejected with its bad lines."""
    try:
        file = client.put_file(path, purpose=purpose)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", code="no_file") from None
    deadline = time.monotonic() + CHECK_WITHIN_S
    while file["state"] in ("uploaded", "processing") and time.monotonic() < deadline:
        time.sleep(0.1)
        file = client.file(file["id"])
    if file["state"] == "rejected":
        raise SpecRejected(_problems(path, file["report"] or {}))
    return str(file["id"])


def _problems(path: Path, report: dict[str, Any]) -> list[InputError]:
    found = [
        InputError(
            f"{path}: {problem['message']}",
            code=problem["code"],
            field=problem.get("field"),
            line=problem.get("line"),
            hint=problem.get("hint"),
        )
        for problem in report.get("problems", [])
    ]
    more = int(report.get("problem_count", 0)) - len(found)
    if more > 0:
        found.append(InputError(f"{path}: and {more} more", code="bad_data"))
    return found or [InputError(f"{path} was rejected.", code="bad_data")]
