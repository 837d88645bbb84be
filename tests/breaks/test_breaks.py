"""Each break of tests/support/breaks.py fails its test, which passes where nothing is broken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.breaks import BREAKS, ROOT, Break

PASSED, FAILED = 0, 1
"""pytest's exit codes; 2 and above: it could not run them."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tree as git knows it, where nobody else works."""
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def run(folder: Path, *tests: str) -> tuple[int, str]:
    """Exit code of pytest in the copy, whose own code is imported, and what it says."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(1200)
def test_all_of_them_pass_where_nothing_is_broken(copy: Path) -> None:
    code, said = run(copy, *sorted({each.test for each in BREAKS}))
    assert code == PASSED, said


@pytest.mark.parametrize("broken", BREAKS, ids=lambda each: each.name)
def test_a_break_fails_its_test(copy: Path, broken: Break) -> None:
    file = copy / broken.file
    whole = file.read_text(encoding="utf-8")
    assert whole.count(broken.old) == 1
    file.write_text(whole.replace(broken.old, broken.new), encoding="utf-8")
    try:
        code, said = run(copy, broken.test)
    finally:
        file.write_text(whole, encoding="utf-8")
    assert code == FAILED, said
    for slip in ("SyntaxError", "NameError", "AttributeError", "ImportError"):
        assert slip not in said  # a break computes something else; it does not crash
