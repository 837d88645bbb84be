"""What jobs answered and measured, as files; of an inference job also what it has so far."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.retention import drop_old
from tuneyard.specs.runner import CHECKPOINTS
from tuneyard.store.folder import manifest_digest, publish_folder, verify_folder

RESULTS_FILE = "results.jsonl"
STATE_FILE = "state.json"

Results = dict[int, dict[str, Any]]
"""A result line for each prompt that is answered, by its place among the prompts."""


def key_of(asked: Sequence[Any]) -> str:
    """A digest of what answers depend on: results under another key are not taken up."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def save_results(attempt: Attempt, results: Results, key: str) -> None:
    """Publish a checkpoint of what is answered so far."""
    step = len(results)
    name = f"{CHECKPOINTS}/step-{step}"
    aside = attempt.workdir / CHECKPOINTS / f".aside-{step}"
    if (attempt.workdir / name).exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_results(aside / RESULTS_FILE, results)
    (aside / STATE_FILE).write_text(json.dumps({"key": key}))
    manifest = publish_folder(aside, attempt.workdir / name, {"kind": "checkpoint", "step": step})
    attempt.events.emit(
        "checkpoint", step=step, path=name, manifest_sha256=manifest_digest(manifest)
    )
    drop_old(attempt.workdir, newest=step)


def read_results(attempt: Attempt, key: str) -> Results:
    """What an earlier attempt answered already, if it was asked the same."""
    if attempt.spec.resume is None:
        return {}
    folder = Path(attempt.spec.resume)
    verify_folder(folder)
    if json.loads((folder / STATE_FILE).read_text())["key"] != key:
        attempt.events.warn("resume_ignored", "The checkpoint answers other prompts.")
        return {}
    lines = (folder / RESULTS_FILE).read_text(encoding="utf-8").splitlines()
    return {row["index"]: row for row in map(json.loads, lines)}


def write_results(path: Path, results: Results) -> None:
    """Write the results in the order of the prompts."""
    path.write_text(as_json_lines(results[i] for i in sorted(results)), encoding="utf-8")


def as_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def measures_files(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """NAME_results.json of each group that has measures, and all_results.json of all of them.

    As transformers writes them: sorted, four spaces in.
    """
    groups = {f"{name}_results.json": dict(values) for name, values in measured.items() if values}
    groups["all_results.json"] = {name: v for each in groups.values() for name, v in each.items()}
    return {
        name: json.dumps(values, indent=4, sort_keys=True) + "\n" for name, values in groups.items()
    }


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files, by name, into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
