"""The list of breaks speaks of code and tests that there are; make test-breaks performs them."""

import pytest
from support.breaks import BREAKS, DOCS, ROOT, Break, rows


@pytest.mark.parametrize("broken", BREAKS, ids=lambda each: each.name)
def test_a_break_names_code_and_a_test_that_are_there(broken: Break) -> None:
    assert (ROOT / broken.file).read_text(encoding="utf-8").count(broken.old) == 1
    file, _, test = broken.test.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_documentation_lists_every_break_with_its_test() -> None:
    assert rows() in DOCS.read_text(encoding="utf-8")
