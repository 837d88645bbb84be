"""A base model's folder: what is refused, and how its class, weights and tokenizer are loaded.

Only the class that config.json names is imported: the Auto classes, and the tokenizer classes that
rebuild what tokenizer.json already says, cost seconds.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.runners.failures import BadSpec, InputGone
from tuneyard.specs.base_models import WITHOUT_ITS_CODE, asks_for_code

PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]*ForCausalLM")
_SCORING = re.compile(r"[A-Z][A-Za-z0-9_]*For(CausalLM|SequenceClassification)")


def read_config(folder: Path, *, scoring: bool = False) -> dict[str, Any]:
    """A base's config.json, nothing in it that would run code of its own.

    scoring: a model that scores sequences is welcome, too.
    Raises: BadSpec, InputGone. Reads a few kB; imports nothing.
    """
    config = _read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            _refuse_code(_read_json(folder / name), name)
    if not list(folder.glob("*.safetensors")):
        _refuse_without_safetensors(folder)
    if not (folder / "tokenizer.json").exists():
        raise BadSpec(
            "The base has no tokenizer.json.",
            field="model",
            hint="save its tokenizer with transformers' save_pretrained, then add it again",
        )
    class_name(config, scoring=scoring)
    return config


def class_name(config: Mapping[str, Any], *, scoring: bool = False) -> str:
    """The one class of transformers that config.json names. Raises: BadSpec."""
    names = config.get("architectures") or []
    for name in names:
        if isinstance(name, str) and (_SCORING if scoring else _CLASS).fullmatch(name):
            return name
    raise BadSpec(
        f"config.json names {names or 'no architecture'}: not a causal language model.",
        field="model",
    )


def load_class(config: Mapping[str, Any], *, scoring: bool = False) -> Any:
    """Import that class; ``scoring``: the one that has a head for scores in its head's place.

    Raises: BadSpec when this transformers does not have it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = class_name(config, scoring=scoring)
    if scoring:
        transformers.utils.logging.set_verbosity_error()  # of a head that is not there yet
        name = name.replace("ForCausalLM", "ForSequenceClassification")
    found = getattr(transformers, name, None)
    if found is None:
        raise BadSpec(
            f"transformers {transformers.__version__} has no {name}.",
            field="model",
            hint="an admin can install a newer one on the nodes, which may know it; code from the "
            "model's folder is never run",
        )
    return found


def attention_of(config: Mapping[str, Any], *, scoring: bool = False) -> str:
    """torch's fused attention, or the family's own where that one leaves out a part of it.

    Soft caps on the scores and learned sinks: some versions of transformers drop them silently.
    """
    if config.get("attn_logit_softcapping") or not _supports_sdpa(config, scoring):
        return "eager"
    return "sdpa"


def _supports_sdpa(config: Mapping[str, Any], scoring: bool) -> bool:
    return bool(load_class(config, scoring=scoring)._supports_sdpa)


def load_weights(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: Any,
    device: str,
    scoring: bool = False,
    quantisation: Any = None,
) -> Any:
    """The base in ``dtype``, in evaluation mode, from its safetensors alone.

    scoring: with a fresh head of one score a sequence, as transformers' reward models have it.
    quantisation: how transformers is to quantise it while it is loaded.
    """
    more: dict[str, Any] = {"device_map": {"": device}} if device != "cpu" else {}
    if quantisation is not None:
        more = {"device_map": {"": device}, "quantization_config": quantisation}
    if scoring:
        more["num_labels"] = 1
    model = load_class(config, scoring=scoring).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention_of(config, scoring=scoring),
        local_files_only=True,
        use_safetensors=True,
        **more,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks its weights in the first evaluation, for sums in bf16 that no
            # gradient passes: what follows would learn another base, or nothing.
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that tokenizer.json describes, with the base's special tokens and template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        # Never a target, never attended to: any id will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that make up the base's tokenizer and its chat template."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    )
    return [folder / name for name in names if (folder / name).is_file()]


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The base's generation_config.json, or nothing."""
    path = folder / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def end_ids(value: Any) -> list[int]:
    """eos_token_id as files write it: a number, a list or nothing."""
    if value is None:
        return []
    return [int(each) for each in value] if isinstance(value, list) else [int(value)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputGone(f"The base has no {path.name}.", field="model") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadSpec(f"The base's {path.name} is not readable.", field="model")
    return found


def _refuse_code(value: Any, name: str) -> None:
    """Refuse what makes libraries import code that the folder or a hub brings."""
    odd = asks_for_code(value)
    if odd is not None:
        raise BadSpec(
            f"{name} has {odd}: it would run code that comes with the model.",
            field="model",
            hint=WITHOUT_ITS_CODE,
        )


def _refuse_without_safetensors(folder: Path) -> None:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if not pickled:
        raise InputGone("The base has no *.safetensors.", field="model")
    raise BadSpec(
        f"The base's weights are pickled ({pickled[0]}): loading them could run any code.",
        field="model",
        hint="convert them to safetensors first",
    )
