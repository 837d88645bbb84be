"""What an adapter says about itself, or a model that was made of one; and what in it is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.runners.failures import BadData, BadSpec, InputGone
from tuneyard.specs.runner import TUNEYARD_FILE
from tuneyard.store.folder import MANIFEST_FILE, manifest_digest, read_manifest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_adapter_config(adapter: Path, *, scoring: bool = False) -> dict[str, Any]:
    """An adapter's configuration; ``scoring``: of a reward model, which writes nothing.

    Raises: BadSpec for another one than that and for what could run code, BadData, InputGone.
    """
    if not (adapter / WEIGHTS_FILE).is_file():
        raise BadSpec(f"The adapter has no {WEIGHTS_FILE}.", field="adapter")
    config = _read(adapter / CONFIG_FILE)
    if config.get("auto_mapping") or config.get("megatron_config"):
        raise BadSpec(f"{CONFIG_FILE} names modules to import.", field="adapter")
    if (config.get("task_type") == "SEQ_CLS") is not scoring:
        what = "no reward model" if scoring else "a reward model: it scores answers, writes none"
        raise BadSpec(f"This adapter is {what}.", field="adapter")
    return config


def read_origin(folder: Path) -> Mapping[str, Any]:
    """tuneyard.json of an adapter or a merged model: template, ends of a turn, base; or nothing."""
    path = folder / TUNEYARD_FILE
    return _read(path) if path.is_file() else {}


def published_digest(folder: Path) -> str | None:
    """The digest of a folder's manifest; None for one that was not published here."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    return manifest_digest(read_manifest(folder))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputGone(f"The adapter has no {path.name}.", field="adapter") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadData(f"{path.name} is not readable.", field="adapter")
    return found
