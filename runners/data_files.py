"""A downloaded data set: its files of rows, which of them can be trained on, and picking one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.rows import count_rows
from tuneyard.store.folder import read_manifest


def describe(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each file with its rows, or with the first thing that is wrong with it.

    A file that cannot be trained on does not spoil the others: whoever picks it is told.
    """
    return [{"path": name, **_judge(folder / name)} for name in names]


def _judge(path: Path) -> dict[str, Any]:
    try:
        return {"rows": count_rows(path), "problem": None}
    except BadData as error:
        problem = {"message": error.message, "line": error.line, "hint": error.hint}
        return {"rows": 0, "problem": problem}


def data_file(path: Path, picked: str | None, *, field: str = "data_file") -> Path:
    """The one file of an input: itself, or of a downloaded data set the one that was picked.

    Raises: BadSpec that lists what there is.
    """
    if not path.is_dir():
        return path
    names = [str(each["path"]) for each in read_manifest(path).get("data_files", [])]
    if picked is None and len(names) == 1:
        return path / names[0]
    if picked in names:
        return path / str(picked)
    what = "has several files" if picked is None else f"has no file {picked[:80]!r}"
    hint = f"set {field} to one of: {', '.join(names[:10])}"
    raise BadSpec(f"The data set {what}.", field=field, hint=hint)
