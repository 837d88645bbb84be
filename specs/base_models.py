"""What a base model's own files may not ask for, at submission and in the runner alike."""

from collections.abc import Mapping
from typing import Any, Literal

RemoteCode = Literal["refused", "ignored"]
"""What `trust_remote_code: true` meets: a 403, or a note that it changes nothing."""

WITHOUT_ITS_CODE = (
    "code of a model's own is never run: where transformers has this family itself, an admin adds "
    "a copy of the folder without auto_map in its JSON files, else a newer transformers"
)
"""What helps where a model brings code, in a hint."""


def asks_for_code(config: Any) -> str | None:
    """The name in a configuration that would make a library import the model's own code.

    >>> asks_for_code({"text_config": [{"auto_map": {"AutoModel": "theirs.Model"}}]})
    'auto_map'
    >>> asks_for_code({"auto_map": None, "_attn_implementation_autoset": True})
    """
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, Mapping):
            pending += value.values()
            for name, each in value.items():
                if _runs_code(name) and not (each is None or isinstance(each, bool)):
                    return str(name)
    return None


def _runs_code(name: str) -> bool:
    """An implementation of attention may be the name of a repository with kernels."""
    return name == "auto_map" or (name.startswith("_") and "implementation" in name)
