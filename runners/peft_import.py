"""Importing peft, with bitsandbytes only where weights are quantised.

peft imports bitsandbytes wherever it is installed, and that imports torch's compiler: 0.7 s of a
runner's start that is 3.5 s otherwise (a CPU, peft 0.21, bitsandbytes 0.50).
"""

import importlib
import sys
from pathlib import Path

from tuneyard.runners.attempt import Attempt

_BITS = ("quantization_bit", "ref_model_quantization_bit")


def import_peft(attempt: Attempt) -> None:
    """Import peft for an attempt, before anything else of this program does.

    peft remembers whether bitsandbytes is there; a process that did not need it does from here on
    if an attempt asks for it.
    """
    importlib.import_module("transformers")  # remembers for itself what is there
    if is_quantised(attempt):
        checks = importlib.import_module("peft.import_utils")
        checks.is_bnb_available.cache_clear()
        checks.is_bnb_4bit_available.cache_clear()
    elif not {"bitsandbytes", "peft"} & sys.modules.keys():
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # "not to be found"
        try:
            checks = importlib.import_module("peft.import_utils")
            checks.is_bnb_available()
        finally:
            del sys.modules["bitsandbytes"]


def is_quantised(attempt: Attempt) -> bool:
    """Whether any weights of an attempt are, or are to be, quantised."""
    asked = any(attempt.spec.arguments.get(name) for name in _BITS)
    return asked or any(map(_stored_quantised, attempt.spec.inputs.values()))


def _stored_quantised(folder: str) -> bool:
    try:
        return b'"quantization_config"' in Path(folder, "config.json").read_bytes()
    except OSError:  # not a model's folder
        return False
