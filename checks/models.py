"""What a model folder says about itself: config.json and the headers of its safetensors."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuneyard.specs.base_models import WITHOUT_ITS_CODE, asks_for_code
from tuneyard.specs.errors import InputError
from tuneyard.store.safetensors import product, read_header

MAX_JSON_BYTES = 32 * 1024**2
MAX_LAYERS = 10_000
MAX_FILES = 10_000

_LAYER = re.compile(r"\.(?:layers|h|blocks|block|layer)\.\d+\..*?(\w+)\.weight$")
_SCORING = re.compile(r"(?:.*\.)?score\.weight$|v_head\.")
_ROUTERS = ("gate", "router")
"""What chooses among experts: no linear layer either, as transformers has it."""
_PART = re.compile(r"\.\d+\.(\w+)")
_PICKLES = tuple(bytes((0x80, version)) for version in range(2, 6))
_OF_TORCH = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".pkl")


def model_facts(folder: Path) -> dict[str, Any]:
    """linear_modules, linear_paths (without the layers' numbers), modules, layer_parts,
    outer_modules, layers, max_position_embeddings, has_chat_template, parameters, scores (whether
    it has a head that says what answers are worth).

    Raises: InputError remote_code_forbidden, unsafe_format, bad_safetensors, not_a_regular_file,
    missing_config, bad_config, too_large.
    """
    files = list(_regular_files(folder))
    config = _read_json(folder / "config.json")
    refuse_code(config, "config.json")
    tensors: dict[str, Mapping[str, Any]] = {}
    for path in files:
        if path.suffix == ".safetensors" and path.parent == folder:
            tensors |= read_header(path)
    _check_index(folder, tensors)
    linear = _linear_paths(tensors)
    return {
        "linear_modules": sorted({path.rpartition(".")[2] for path in linear}),
        "linear_paths": sorted(linear),
        "modules": sorted(_modules(tensors)),
        "layer_parts": sorted(
            {found.group(1) for name in tensors if (found := _PART.search(name))}
        ),
        "outer_modules": sorted({_module(name) for name in tensors if not _PART.search(name)}),
        "layers": _number(config, "num_hidden_layers", most=MAX_LAYERS) or 0,
        "max_position_embeddings": _number(config, "max_position_embeddings"),
        "has_chat_template": _has_template(folder),
        "parameters": sum(product(tensor["shape"]) for tensor in tensors.values()),
        "scores": any(_SCORING.match(name) for name in tensors),
    }


def _regular_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, links and other things refused, nothing followed."""
    pending, seen = [folder], 0
    while pending:
        for entry in sorted(os.scandir(pending.pop()), key=lambda each: each.name):
            seen += 1
            if seen > MAX_FILES:
                raise InputError("The folder holds too many files.", code="too_large")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                continue
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                message = f"{entry.name} is not a regular file."
                raise InputError(message, code="not_a_regular_file", hint="copy the file itself")
            _refuse_pickle(Path(entry.path))
            yield Path(entry.path)


def _refuse_pickle(path: Path) -> None:
    """By content, not by name: a zip under a name of weights is what torch.save writes."""
    with path.open("rb") as file:
        head = file.read(4)
    zipped = head == b"PK\x03\x04" and path.suffix in _OF_TORCH
    named = path.suffix in (".pt", ".pth", ".ckpt", ".pkl") or path.name.endswith("model.bin")
    if head.startswith(_PICKLES) or zipped or named:
        message = f"{path.name} holds a Python pickle, which may run code."
        raise InputError(message, code="unsafe_format", hint="save the weights as safetensors")


def refuse_code(config: Any, name: str) -> None:
    """Refuse a configuration that would run code of its own, however deep it stands."""
    odd = asks_for_code(config)
    if odd is not None:
        message = f"{name} asks for code of its own ({odd})."
        raise InputError(message, code="remote_code_forbidden", field=odd, hint=WITHOUT_ITS_CODE)


def _check_index(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Every tensor that the index of a sharded model lists is there."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    listed = _read_json(path).get("weight_map")
    missing = [name for name in listed if name not in tensors] if isinstance(listed, dict) else []
    if missing:
        message = f"{len(missing)} tensors of the index are missing, such as {missing[0][:80]!r}."
        hint = "download the model again"
        raise InputError(message, code="bad_safetensors", hint=hint)


def _linear_paths(tensors: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Not experts: files hold each by itself, transformers all of a layer in one tensor."""
    return {
        re.sub(r"\.\d+\.", ".", name).removesuffix(".weight")
        for name, tensor in tensors.items()
        if len(tensor["shape"]) == 2
        and ".experts." not in name
        and (found := _LAYER.search(f".{name}"))
        and found.group(1) not in _ROUTERS
    }


def _modules(tensors: Mapping[str, Any]) -> set[str]:
    """Last names of all that has weights; a tied output has none of its own and is there too."""
    found = {name.split(".")[-2] for name in tensors if name.count(".")}
    return found | ({"lm_head"} if "embed_tokens" in found else set())


def _module(name: str) -> str:
    """The last name of what a tensor belongs to."""
    return name.split(".")[-2] if "." in name else name


def _number(config: Mapping[str, Any], name: str, *, most: int = 2**40) -> int | None:
    text = config.get("text_config")
    value = config.get(name, text.get(name) if isinstance(text, Mapping) else None)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {name} is no number.", code="bad_config", field=name)
    if value > most:
        raise InputError(f"config.json: {name} = {value}.", code="too_large", field=name)
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path.name} is too large.", code="too_large")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"The folder has no {path.name}.", code="missing_config") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path.name} is no JSON.", code="bad_config") from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is no JSON object.", code="bad_config")
    return value


def _has_template(folder: Path) -> bool:
    tokenizer = folder / "tokenizer_config.json"
    config = _read_json(tokenizer) if tokenizer.exists() else {}
    refuse_code(config, tokenizer.name)
    names = ("chat_template.jinja", "chat_template.json")
    return bool(config.get("chat_template")) or any((folder / name).exists() for name in names)
