"""What stands around a merged model's weights: the base's own files, changed where they must be.

Files go over byte for byte but for: the weights' format and untied ends in config.json, the tokens
that end a turn in generation_config.json, the template that trained. Where transformers 5 wrote
what transformers 4 misreads without an error, the older word is put beside it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.base_model import PICKLED, end_ids
from tuneyard.runners.layouts import LAYOUTS, jinja
from tuneyard.runners.origin import CONFIG_FILE, WEIGHTS_FILE
from tuneyard.runners.run_files import RUN_FILES
from tuneyard.runners.tensor_files import INDEX_FILE
from tuneyard.specs.runner import TUNEYARD_FILE
from tuneyard.store.folder import MANIFEST_FILE, is_safe_name

ADAPTER_FOLDER = "adapter"
"""Where the adapter's own files lie: beside the weights they would be applied a second time."""

TEMPLATE_FILE = "chat_template.jinja"

_NOT_COPIED = {*PICKLED, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".py"}
_NOT_THE_BASES = {MANIFEST_FILE, INDEX_FILE, TUNEYARD_FILE, CONFIG_FILE, "README.md", *RUN_FILES}
_OF_AN_ADAPTER = (CONFIG_FILE, WEIGHTS_FILE, TUNEYARD_FILE, "trainer_log.jsonl")


@dataclass(frozen=True)
class Change:
    """How the result differs from its base, but for the weights.

    dtype: torch's name of the weights' format; None keeps what the base says. origin: what the
    adapter says about itself; template: for one that says nothing.
    """

    dtype: str | None
    untied: bool
    origin: Mapping[str, Any]
    template: str | None = None


def write_surroundings(base: Path, folder: Path, change: Change) -> None:
    """Put everything but weights and tuneyard.json into the folder."""
    for path in base_files(base):
        shutil.copyfile(path, folder / path.name)
    _edit(folder / "config.json", config_changes(_json(base / "config.json"), change))
    _write_ends(folder, change)
    _write_template(folder, change)


def keep_adapter(adapter: Path, folder: Path) -> None:
    """Put the adapter's own files below the folder."""
    (folder / ADAPTER_FOLDER).mkdir()
    for name in _OF_AN_ADAPTER:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / ADAPTER_FOLDER / name)


def base_files(base: Path) -> Iterator[Path]:
    """A base's plain files beside its weights: configuration, tokenizer, licence."""
    for path in sorted(base.iterdir()):
        wanted = path.name not in _NOT_THE_BASES and path.suffix not in _NOT_COPIED
        if wanted and path.is_file() and is_safe_name(path.name):
            yield path


def config_changes(config: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Names of config.json that must say something else."""
    changes: dict[str, Any] = {}
    said = [name for name in ("dtype", "torch_dtype") if name in config]
    if change.dtype is not None:
        changes |= dict.fromkeys(said or ["torch_dtype"], change.dtype)
    if change.untied:
        changes["tie_word_embeddings"] = False
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in config:
        changes["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default" and "rope_scaling" not in config:
            changes["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {name: value for name, value in changes.items() if config.get(name) != value}


def _write_ends(folder: Path, change: Change) -> None:
    """All tokens that end a turn stand in generation_config.json."""
    path, config = folder / "generation_config.json", _json(folder / "config.json")
    known = _json(path) if path.exists() else {}
    ends = end_ids(known.get("eos_token_id", config.get("eos_token_id")))
    more = [i for i in change.origin.get("stop_token_ids") or () if i not in ends]
    if not more:
        return
    if not path.exists():
        names = ("bos_token_id", "pad_token_id")
        said = {name: config[name] for name in names if config.get(name) is not None}
        path.write_text(json.dumps(said) + "\n", encoding="utf-8")
    _edit(path, {"eos_token_id": [*ends, *more]})


def _write_template(folder: Path, change: Change) -> None:
    """The template that trained, in both places where versions of transformers look."""
    path = folder / "tokenizer_config.json"
    tokenizer = _json(path) if path.exists() else {}
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        _edit(path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    own = _own_template(folder, tokenizer)
    template = change.origin.get("template")
    if template is None and own is None and change.template:
        template = _named(change.template)
    if template is None or template == own:
        return
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    if "chat_template" in tokenizer:
        _edit(path, {"chat_template": template})


def _named(template: str) -> str | None:
    """The jinja that is meant; None where a name means the base's own."""
    if "{" in template:
        return template
    return jinja(LAYOUTS[template]) if template in LAYOUTS else None


def _own_template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """What the folder speaks by, were nothing changed."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    own = tokenizer.get("chat_template")
    return own if isinstance(own, str) else None


def _edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Set names of a JSON file, the others in their order; none leaves it as it is."""
    if not changes:
        return
    text = json.dumps(_json(path) | dict(changes), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
