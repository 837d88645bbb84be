"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import tuneyard

ROOT = Path(tuneyard.__file__).parent
WITH_EXAMPLES = [
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "tuneyard.")
    if (path := ROOT / (module.name.removeprefix("tuneyard.").replace(".", "/") + ".py")).exists()
    and ">>> " in path.read_text(encoding="utf-8")
]


def test_there_are_examples() -> None:
    assert "tuneyard.store.folder" in WITH_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
