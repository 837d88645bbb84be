"""A model's folder before it is published: what could run code or lies about itself is refused."""

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneyard.runners.base_model import read_config
from tuneyard.runners.failures import BadSpec, InputGone, RunnerError
from tuneyard.specs.errors import InputError
from tuneyard.specs.sources import ON_NODES, allowed_root
from tuneyard.store.folder import is_safe_name
from tuneyard.store.safetensors import read_header

MAX_FOLDERS = 1000


def check_model(folder: Path) -> dict[str, Any]:
    """Its config.json, once all of it is in order. Raises: BadSpec, InputGone."""
    try:
        config = read_config(folder)
        tensors: dict[str, Mapping[str, Any]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= read_header(path)
    except InputError as error:
        raise BadSpec(error.message, field="source", hint=error.hint) from None
    except RunnerError as error:
        error.field = "source"
        raise
    _check_index(folder, tensors)
    return config


def _check_index(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Every tensor that the index of a sharded model lists is there."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        missing = [name for name in listed if name not in tensors]
    except (ValueError, KeyError, TypeError):
        raise BadSpec(f"{path.name} is not readable.", field="source") from None
    if missing:
        message = f"{len(missing)} tensors of {path.name} are missing, such as {missing[0][:80]!r}."
        raise BadSpec(message, field="source", hint="the source is not whole: save it again")


def allowed_path(path: Path, roots: Sequence[str]) -> Path:
    """A path of the nodes, links resolved, that lies below an allowed root. Raises: BadSpec."""
    real = Path(os.path.realpath(path))
    tops = [os.path.realpath(root) for root in roots]
    if allowed_root(str(real), tops) is None:
        allowed = ", ".join(roots) or "none"
        message = f"node:{path} does not lie below an allowed root (allowed: {allowed})."
        raise BadSpec(message, field="source", hint=ON_NODES)
    if not real.exists():
        raise InputGone(f"There is no {path} on this node.", field="source")
    return real


def plain_files(folder: Path) -> Iterator[str]:
    """Names of all files below; what a wanted one really is ``source_file`` looks at."""
    for seen, (parent, folders, names) in enumerate(os.walk(folder)):
        if seen > MAX_FOLDERS:
            raise BadSpec(f"{folder} holds more than {MAX_FOLDERS} folders.", field="source")
        folders.sort()
        for name in sorted(names):
            relative = Path(parent, name).relative_to(folder).as_posix()
            if is_safe_name(relative):
                yield relative


def source_file(folder: Path, name: str, tops: Sequence[str]) -> Path:
    """A wanted file of a folder of the nodes: a plain one, that does not lead out of the roots.

    Raises: BadSpec.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    inside = [*tops, str(folder)]
    if allowed_root(str(real), inside) is None:
        raise BadSpec(
            f"{name} is a link that leads out of {folder}.",
            field="source",
            hint="copy the file itself",
        )
    try:
        mode = real.stat().st_mode
    except OSError:
        message = f"{name} is a link that leads nowhere."
        raise BadSpec(message, field="source", hint="copy the file itself") from None
    if not stat.S_ISREG(mode):
        message = f"{name} is not a regular file."
        raise BadSpec(message, field="source", hint="copy the file itself")
    return real
