"""Commands that reproduce fine-tunes: what one followed from, and the same run again."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tuneyard.cli.jobs import Job, find
from tuneyard.cli.output import plain_error, print_json, say, size
from tuneyard.cli.profile import Json, connect
from tuneyard.cli.reading import unwritable
from tuneyard.cli.submitting import upload
from tuneyard.cli.watching import await_end, report_failure, watch_job
from tuneyard.client import Client, Refused
from tuneyard.client.bundle import (
    Bundle,
    describe_run,
    differences,
    weights_of,
    write_bundle,
)
from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import MAX_NAME


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(bundle)
    app.command()(rerun)


def bundle(
    job: Job,
    output: Annotated[
        Path | None, typer.Option("--out", help="Zip to write; unset: one named as the job.")
    ] = None,
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Take the uploaded data along.")
    ] = False,
    json: Json = False,
) -> None:
    """Write down what a fine-tune followed from and came to, for `tuneyard rerun`.

    Example: tuneyard bundle job_019ab3f2c4d57e1f8a6b5c4d3e2f1a0b --out tuny.zip
    """
    with connect() as client:
        job = find(client, job)
        path = output or Path(f"{job}.zip")
        try:
            names = write_bundle(client, job, path, with_data=with_data)
        except OSError as error:
            raise unwritable(path, error) from None
    if json:
        print_json({"file": str(path), "files": names})
        return
    say(f"{path}  {size(path.stat().st_size)}  {', '.join(names)}")
    say(f"  next: tuneyard rerun {path}")


def rerun(
    file: Annotated[Path, typer.Argument(help="A bundle: the zip or its unpacked folder.")],
    compare: Annotated[
        str | None, typer.Option(help="Hold it against this job instead of a new one.")
    ] = None,
    json: Json = False,
) -> int:
    """Run a bundle's fine-tune again, and say whether the weights are the same.

    Example: tuneyard rerun tuny.zip
    """
    read = Bundle(file)
    with connect() as client:
        if compare is not None:
            return _compare(client, read, find(client, compare), as_json=json)
        made = _submit(client, read)
        if json:
            ended = await_end(client, made["id"])
            if ended["state"] != "succeeded":
                report_failure(ended)
                return 1
        else:
            say(f"{made['id']}  {made['name']}  {made['state']}")
            if went_on := read.about.get("went_on_from"):
                say(f"  note: it went on from a checkpoint of {went_on}; this begins at step 0")
            if code := watch_job(client, made["id"]):
                return code
        return _compare(client, read, made["id"], as_json=json)


def _submit(client: Client, read: Bundle) -> dict[str, Any]:
    """Submit the bundle's spec with the very same inputs. Raises: InputError, Refused."""
    about = read.about
    document = dict(about["spec"])
    document.pop("from_scratch", None)
    document["name"] = f"{str(about.get('name'))[: MAX_NAME - 6]} again"
    document["metadata"] = {**dict(document.get("metadata") or {}), "rerun_of": about["job"]}
    for field in about["inputs"].keys() & document.keys():
        document[field] = _found_here(client, read, field)
    if isinstance(about["spec"].get("adapter"), list):
        fields = [name for name in about["inputs"] if name.startswith("adapter")]
        document["adapter"] = [_found_here(client, read, field) for field in fields]
    try:
        return client.submit(document)
    except Refused as error:
        source = about["inputs"].get(error.field or "", {}).get("source")
        if source:
            revision = about["inputs"][error.field].get("revision")
            at = f" --revision {revision}" if revision else ""
            error.hint = f"`tuneyard download {source}{at} --wait` brings it; then try again"
        raise


def _found_here(client: Client, read: Bundle, field: str) -> Any:
    """What this server knows an input by: its id here, found by what is in it, or as it was."""
    given = read.about["inputs"][field]
    known, sha256 = str(given["id"]), given["sha256"]
    if known.startswith("file_"):
        same = [each["id"] for each in client.files(limit=2000) if each["sha256"] == sha256]
        return str(same[0]) if same else _upload(client, read, field)
    same = [each["id"] for each in client.models() if each["digest"] == sha256]
    if known.startswith("artifact_") and "dataset" not in field:
        known = read.about["spec"].get(field, known)  # a tuned model has no such id
    return same[0] if same else known


def _upload(client: Client, read: Bundle, field: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = read.data(field, Path(folder))
        if path is not None:
            return upload(client, path, purpose="dataset")
    sha256 = read.about["inputs"][field]["sha256"]
    raise InputError(
        f"The {field} of this run, sha256 {sha256}, is not on this server.",
        code="no_file",
        field=field,
        hint="`tuneyard files put FILE` brings it; `bundle JOB --with-data` takes it along",
    )


def _compare(client: Client, read: Bundle, job: str, *, as_json: bool) -> int:
    """Say whether a job's weights are the bundle's; the exit code."""
    now = describe_run(client, job)
    was, is_ = weights_of(read.about), weights_of(now)
    same = was == is_ and bool(was)
    differ = [str(each) for each in differences(read.about, now)]
    if as_json:
        print_json({"job": job, "same": same, "was": was, "is": is_, "differences": differ})
        return 0 if same else 1
    for line in _verdict(same, was, is_):
        say(line)
    for line in differ:
        say(f"  {line}")
    if not same and not differ:
        plain_error("  nothing that is written down differs")
    return 0 if same else 1


def _verdict(same: bool, was: Mapping[str, str], is_: Mapping[str, str]) -> list[str]:
    if same:
        return [f"the same weights: {name}  sha256 {sha256}" for name, sha256 in was.items()]
    names = sorted(name for name in was.keys() | is_.keys() if was.get(name) != is_.get(name))
    return [
        f"other weights: {name}  sha256 {was.get(name, 'none')} then, {is_.get(name, 'none')} now"
        for name in names
    ] or ["other weights"]
