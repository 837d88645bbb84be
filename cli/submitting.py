"""From a file on the client's disk to a submission: paths in it are the client's, and go along."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneyard.cli.reading import read_small, unreadable
from tuneyard.client import Client, Refused
from tuneyard.specs.documents import apply_overrides, read_json, read_yaml
from tuneyard.specs.errors import InputError, SpecRejected
from tuneyard.specs.jobs import read_spec
from tuneyard.specs.pipelines import read_pipeline

CHECK_WITHIN_S = 10.0
LOOK_EVERY_S = 0.1
FILES = {"dataset": "dataset", "eval_dataset": "dataset", "prompts": "prompts"}
"""Field -> purpose of the file that it names."""

NAME_ONE = "name a file, or the id of an upload"
PLACEHOLDER = "file_" + "0" * 32


def read_document(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a YAML or JSON file, or stdin for ``-``. Raises: InputError that names it."""
    content = read_small(name, hint="that is no job; data goes by `tuneyard files put`")
    try:
        document = (read_json if name.lower().endswith(".json") else read_yaml)(content)
    except InputError as error:
        error.message = f"{'stdin' if name == '-' else name}: {error.message}"
        raise
    if isinstance(document.get("pipeline"), list):
        return _override_steps(document, overrides)
    document = apply_overrides(document, overrides)
    if name != "-" and document.get("name") is None:
        document["name"] = Path(name).stem
    return document


def _override_steps(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``step.key=value`` over the steps of a pipeline."""
    steps = list(document["pipeline"])
    names = [step.get("name") if isinstance(step, Mapping) else None for step in steps]
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or name not in names:
            known = ", ".join(str(each) for each in names if each) or "none has a name"
            message = f"{override[:80]!r} names no step."
            hint = f"write STEP.key=value; steps here: {known}"
            raise InputError(message, code="bad_override", hint=hint)
        position = names.index(name)
        steps[position] = apply_overrides(dict(steps[position]), [rest])
    return document | {"pipeline": steps}


def submit_document(client: Client, document: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Upload the files that a job or a pipeline names, then submit it with their ids.

    Raises: Refused that speaks of the files by their paths, as the document does.
    """
    paths: dict[str, str] = {}

    def uploaded(job: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            field: upload(client, path, purpose=FILES[field])
            for field, path in _files_in(job, base).items()
        }
        paths.update({found[field]: str(path) for field, path in _files_in(job, base).items()})
        return {**job, **found}

    try:
        return client.submit(_in_each_job(document, uploaded))
    except Refused as error:
        raise error.naming(paths) from None


def check_alone(document: Mapping[str, Any], base: Path) -> None:
    """Refuse what is wrong by itself before anything travels. Raises: SpecRejected.

    Whether `trust_remote_code: true` is refused the server alone knows.
    """

    def placeholders(job: Mapping[str, Any]) -> dict[str, Any]:
        return {**job, **dict.fromkeys(_files_in(job, base), PLACEHOLDER)}

    asked = _in_each_job(document, placeholders)
    if "pipeline" in asked:
        read_pipeline(asked, remote_code="ignored")
    else:
        read_spec(asked, remote_code="ignored")


def _in_each_job(
    document: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Change a job's document, or those of all steps of a pipeline."""
    if not isinstance(document.get("pipeline"), list):
        return change(document)
    steps = [change(s) if isinstance(s, Mapping) else s for s in document["pipeline"]]
    return {**document, "pipeline": steps}


def _files_in(document: Mapping[str, Any], base: Path) -> dict[str, Path]:
    named = {field: document.get(field) for field in FILES}
    found = {
        field: local_file(value, base, field=field)
        for field, value in named.items()
        if isinstance(value, str)
    }
    return {field: path for field, path in found.items() if path is not None}


def local_file(value: str, base: Path, *, field: str) -> Path | None:
    """The file that a value names, beside the document first, then here; None: it is no path.

    Raises: InputError for a path at which there is no file.
    """
    if value.startswith(("file_", "node:")) or "\0" in value:
        return None
    for folder in (base, Path.cwd()):
        try:
            path = folder / Path(value).expanduser()
            if path.is_file():
                return path
            if path.is_dir():
                raise InputError(f"{path} is a folder.", code="no_file", field=field, hint=NAME_ONE)
        except (OSError, RuntimeError):  # too long a name, a user without a home
            continue
    if "," in value:
        message = f"{value[:200]} names several files."
        raise InputError(message, code="not_supported_yet", field=field, hint="join them into one")
    if "/" in value or value.lower().endswith((".json", ".jsonl", ".txt")):
        message = f"{value[:200]} is no file, neither beside the document nor here."
        raise InputError(message, code="no_file", field=field, hint=NAME_ONE)
    return None


def upload(client: Client, path: Path, *, purpose: str) -> str:
    """Upload a file and wait a moment for its check. Raises: SpecRejected with its bad lines."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty.", code="empty_file")
        file = client.put_file(path, purpose=purpose)
    except OSError as error:
        raise unreadable(path, error) from None
    deadline = time.monotonic() + CHECK_WITHIN_S
    while file["state"] in ("uploaded", "processing") and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
        file = client.file(file["id"])
    if file["state"] == "rejected":
        raise SpecRejected(_problems(path, file["report"] or {}))
    return str(file["id"])


def _problems(path: Path, report: Mapping[str, Any]) -> list[InputError]:
    found = [
        InputError(
            f"{path}: {problem['message']}",
            code=problem["code"],
            field=problem.get("field"),
            line=problem.get("line"),
            hint=problem.get("hint"),
        )
        for problem in report.get("problems", [])
    ]
    more = int(report.get("problem_count", 0)) - len(found)
    if more > 0:
        found.append(InputError(f"{path}: and {more} more", code="bad_data"))
    return found or [InputError(f"{path} was rejected.", code="bad_data")]
