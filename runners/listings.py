"""What a hub or a folder has, and which of it is wanted: names and sizes only, no bytes."""

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneyard.runners.failures import BadSpec, InputGone
from tuneyard.specs.sources import HUB_NAMES, Hub

PIECE_BYTES = 4 * 1024**2

READ = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Beside weights, what transformers or a lawyer reads; in the model's own folder alone."""

TEMPLATES = "additional_chat_templates/*.jinja"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHER_WEIGHTS = ("*.gguf", "*.onnx", "*.h5", "*.msgpack")
DATA = (".json", ".jsonl", ".csv", ".parquet")
ABOUT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "configuration.json", "state.json", "config.json"}
)
"""JSON files that describe a data set and hold no rows of it."""

_WHOLE_MODEL = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its hub lists it. The hashes are None where the hub says none."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def is_at(self, path: Path) -> bool:
        """Whether these very bytes stand at a path."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return _digest(path, hashlib.sha256()) == self.sha256
        if self.git_sha1 is not None:
            blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            return _digest(path, blob) == self.git_sha1
        return True


def _digest(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. ref: what was asked for, such as a branch."""

    hub: Hub
    repo: str
    what: str  # model or dataset
    ref: str
    commit: str
    files: Sequence[RemoteFile]
    endpoint: str

    @property
    def shown(self) -> str:
        """For sentences."""
        return f"{self.repo} on {HUB_NAMES[self.hub]}"

    def only(self, names: Iterable[str]) -> list[RemoteFile]:
        """The files of these names."""
        wanted = set(names)
        return [file for file in self.files if file.path in wanted]


def refuse_escapes(names: Iterable[str], *, shown: str) -> None:
    """Refuse a listing that names files outside itself. Raises: BadSpec."""
    for name in names:
        parts = name.split("/")
        if not name or name.startswith("/") or "\\" in name or ".." in parts or "\0" in name:
            raise BadSpec(
                f"{shown} lists a file outside itself: {name[:80]!r}.",
                field="source",
                hint="nothing was taken from it; name another source",
            )


def files_of_model(names: Sequence[str], *, shown: str) -> list[str]:
    """What transformers needs of a model's files. Raises: BadSpec where no weights are safe."""
    refuse_escapes(names, shown=shown)
    weights = _safetensors([name for name in names if "/" not in name])
    if not weights:
        raise _no_weights(names, shown)
    others = [
        name
        for name in names
        if fnmatch.fnmatchcase(name, TEMPLATES)
        or ("/" not in name and any(fnmatch.fnmatchcase(name, each) for each in READ))
    ]
    return sorted({*weights, *(name for name in others if not name.startswith("."))})


def _safetensors(names: Sequence[str]) -> list[str]:
    """The model's own shards; weights of other forms beside them (consolidated, fp16) stay away."""
    found = [name for name in names if name.endswith(".safetensors")]
    own = [name for name in found if _WHOLE_MODEL.fullmatch(name)]
    return own or [name for name in found if not name.startswith("adapter_")]


def _no_weights(names: Sequence[str], shown: str) -> BadSpec | InputGone:
    for patterns, message, hint in (
        (
            PICKLED,
            "{} has pickled weights alone ({}): loading them could run any code.",
            "take a revision or a copy with *.safetensors, or convert them first",
        ),
        (
            OTHER_WEIGHTS,
            "{} has weights of another format alone ({}).",
            "take the model's *.safetensors; a GGUF file on the nodes goes by node:/path/x.gguf",
        ),
    ):
        for name in sorted(names):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                return BadSpec(message.format(shown, name[:80]), field="source", hint=hint)
    if "adapter_config.json" in names:
        hint = "download its base model; adapters are made here by a fine-tune"
        return BadSpec(f"{shown} is an adapter, no model.", field="source", hint=hint)
    hint = "is it a data set? then what: dataset"
    return InputGone(f"{shown} has no *.safetensors.", field="source", hint=hint)


def files_of_dataset(names: Sequence[str], data_file: str | None, *, shown: str) -> list[str]:
    """A data set's files of rows. Raises: BadSpec that lists them where ``data_file`` is none."""
    refuse_escapes(names, shown=shown)
    found = sorted(
        name
        for name in names
        if name.lower().endswith(DATA)
        and name.rpartition("/")[2] not in ABOUT_DATA
        and not any(part.startswith(".") for part in name.split("/"))
    )
    if not found:
        kinds = ", ".join(DATA)
        raise InputGone(f"{shown} has no file of rows ({kinds}).", field="source")
    if data_file is None:
        return found
    if data_file not in found:
        some = ", ".join(found[:10])
        message = f"{shown} has no file {data_file[:80]!r} of rows."
        raise BadSpec(message, field="data_file", hint=f"it has {some}")
    return [data_file]
