"""A merged model in a folder of the client's, which may be the one that its adapter lies in."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneyard.cli.reading import unwritable
from tuneyard.client import Client
from tuneyard.client.download import file_sha256
from tuneyard.specs.errors import InputError

_OF_AN_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin|json)")

Entries = Sequence[Mapping[str, Any]]


def export_folder(document: Mapping[str, Any]) -> Path | None:
    """Where a merge's document wants its result. Raises: InputError where nothing can be written.

    As LLaMA-Factory reads it: from the folder in which the command runs.
    """
    value = document.get("export_dir")
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        folder = Path(value).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{value[:200]} cannot be written to: {reason}."
        raise InputError(message, code="not_writable", field="export_dir") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        message = f"{folder} cannot be written to."
        raise InputError(message, code="not_writable", field="export_dir")
    return folder


def write_export(client: Client, job: str, folder: Path) -> None:
    """Fetch a merge's model, each file checked. Raises: InputError for a folder in other use."""
    artifact = next(a["id"] for a in client.artifacts(job) if a["kind"] == "model")
    entries = client.artifact_files(job, artifact)
    elsewhere = f"the model is made: `tuneyard fetch {job} --out DIR` fetches it elsewhere"
    _refuse_other_weights(folder, entries, hint=elsewhere)
    try:
        _put_adapter_below(folder, entries, hint=elsewhere)
        client.fetch_artifact(job, artifact, folder)
    except OSError as error:
        raise unwritable(folder, error) from None


def _refuse_other_weights(folder: Path, entries: Entries, *, hint: str) -> None:
    """Loaders would take files of an earlier export for the new one's."""
    listed = {entry["path"] for entry in entries}
    other = [p.name for p in folder.iterdir() if _WEIGHTS.fullmatch(p.name)]
    if odd := sorted(set(other) - listed):
        message = f"{folder} holds weights of another model, such as {odd[0]}."
        raise InputError(message, code="folder_taken", field="export_dir", hint=hint)


def _put_adapter_below(folder: Path, entries: Entries, *, hint: str) -> None:
    """Move this adapter's files to adapter/: beside the weights they would be applied again."""
    merged = {entry["path"]: entry["sha256"] for entry in entries}
    found = [folder / name for name in _OF_AN_ADAPTER if (folder / name).exists()]
    for path in found:
        if file_sha256(path) != merged.get(f"adapter/{path.name}"):
            message = f"{folder} holds another adapter ({path.name}), which would be applied, too."
            raise InputError(message, code="folder_taken", field="export_dir", hint=hint)
    for path in found:
        (folder / "adapter").mkdir(exist_ok=True)
        os.replace(path, folder / "adapter" / path.name)
