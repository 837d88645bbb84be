"""Reproduction bundles: what a finished fine-tune followed from and came to, in one small file.

A zip, or its unpacked folder: bundle.json (spec, sha256 of inputs and results, seed, versions,
platform), the run's own files, and data/ where it was asked to come along.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from uuid import uuid4

from tuneyard.client.download import file_sha256
from tuneyard.client.http import Client
from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import OF_THE_JOB
from tuneyard.specs.runner import REPORTS, REPRODUCTION_FILE, TUNEYARD_FILE

BUNDLE_FILE = "bundle.json"
FORMAT = 1
MAX_BYTES = 16 * 1024**2
PIECE_BYTES = 1024**2

RUN_FILES = (REPRODUCTION_FILE, TUNEYARD_FILE, "training_args.yaml", "trainer_log.jsonl")
"""What goes into a bundle of the files that a fine-tune leaves."""

_NO_RESULT = ("checkpoint", "log", REPORTS)

Said = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """Something that is otherwise in another run."""

    what: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


def describe_run(client: Client, job: str) -> dict[str, Any]:
    """bundle.json of a fine-tune. Raises: InputError for a job that has none."""
    found = client.job(job)
    if found["kind"] != "finetune":
        message = f"{job} is {found['kind']}: fine-tunes alone are bundled."
        raise InputError(message, code="not_a_finetune")
    if found["state"] != "succeeded":
        hint = f"`tuneyard watch {job}` waits for its end"
        raise InputError(
            f"{job} is {found['state']}: it has no result.", code="no_result", hint=hint
        )
    artifact = next(a for a in client.artifacts(job) if a["kind"] not in _NO_RESULT)
    result = {e["path"]: e["sha256"] for e in client.artifact_files(job, artifact["id"])}
    if REPRODUCTION_FILE not in result:
        message = f"{job} was tuned by a version that did not write {REPRODUCTION_FILE}."
        raise InputError(message, code="no_bundle", hint="tune once more: `tuneyard retry JOB`")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, REPRODUCTION_FILE)
        entry = {"path": REPRODUCTION_FILE, "sha256": result[REPRODUCTION_FILE]}
        client.fetch_artifact_file(job, artifact["id"], entry, path)
        follows_from: dict[str, Any] = json.loads(path.read_bytes())
    fresh = not found["retry_of"] or found["spec"].get("from_scratch")
    return follows_from | {
        "format": FORMAT,
        "job": job,
        "name": found["name"],
        "spec": found["spec"],
        "artifact": artifact["id"],
        "result": result,
        "went_on_from": None if fresh else found["retry_of"],
        "warnings": _warnings(client, job),
    }


def _warnings(client: Client, job: str) -> list[str]:
    found = [event["data"] for event in client.events(job) if event["type"] == "warning"]
    return [str(data.get("message")) for data in found]


def write_bundle(client: Client, job: str, path: Path, *, with_data: bool) -> list[str]:
    """Write a fine-tune's bundle as a zip, whole or not at all; the names in it.

    Raises: InputError, OSError.
    """
    about = describe_run(client, job)
    with tempfile.TemporaryDirectory() as folder:
        files = _fetch_run_files(client, about, Path(folder))
        if with_data:
            files |= _fetch_data(client, about, Path(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False)
                archive.writestr(BUNDLE_FILE, text + "\n")
                for name, file in files.items():
                    archive.write(file, name)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return [BUNDLE_FILE, *files]


def _fetch_run_files(client: Client, about: Said, folder: Path) -> dict[str, Path]:
    there = {name: about["result"][name] for name in RUN_FILES if name in about["result"]}
    for name, sha256 in there.items():
        entry = {"path": name, "sha256": sha256}
        client.fetch_artifact_file(about["job"], about["artifact"], entry, folder / name)
    return {name: folder / name for name in there}


def _fetch_data(client: Client, about: Said, folder: Path) -> dict[str, Path]:
    """Uploads that the run learned from; each input says where it lies in the bundle."""
    files = {}
    for field, given in about["inputs"].items():
        if given["id"].startswith("file_"):
            name = f"data/{field}/{PurePosixPath(client.file(given['id'])['name']).name}"
            client.fetch_file(given["id"], folder / name)
            files[name] = folder / name
            given |= {"file": name, "bytes": files[name].stat().st_size}
    return files


class Bundle:
    """A bundle that somebody made, read with care."""

    def __init__(self, path: Path) -> None:
        """Raises: InputError that says why this is no bundle."""
        self.path = path
        self.about = self._about()

    def _about(self) -> Said:
        try:
            with self._open(BUNDLE_FILE) as file:
                found = json.loads(file.read(MAX_BYTES))
            known = found["format"] == FORMAT
            parts = [found[name] for name in ("spec", "inputs", "versions", "platform", "result")]
            whole = all(isinstance(part, dict) for part in parts) and isinstance(found["job"], str)
            inputs = [(each["id"], each["sha256"]) for each in found["inputs"].values()]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._bad(f"its {BUNDLE_FILE} cannot be read") from None
        if not known:
            raise self._bad("it was written by another version of Tuneyard")
        texts = all(isinstance(id_, str) and isinstance(sha, str | None) for id_, sha in inputs)
        if not (whole and texts):
            raise self._bad(f"its {BUNDLE_FILE} lacks something")
        return dict(found)

    def data(self, field: str, folder: Path) -> Path | None:
        """The data that came along for a field, written into a folder; None: they did not.

        Raises: InputError where they are not those that trained.
        """
        given = self.about["inputs"][field]
        name = given.get("file")
        if name is None:
            return None
        parts = PurePosixPath(str(name)).parts
        if parts[:1] != ("data",) or ".." in parts:
            raise self._bad(f"it names {str(name)[:60]!r}")
        path = folder / parts[-1]
        with self._open(str(name)) as source, path.open("wb") as target:
            self._copy(source, target, at_most=int(given.get("bytes") or 0))
        if file_sha256(path) != given["sha256"]:
            raise self._bad(f"{name} is not the file that trained")
        return path

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            if self.path.is_dir():
                with (self.path / name).open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(name) as member:
                    yield member
        except (KeyError, FileNotFoundError):
            missing = f"it has no {name}" if self.path.exists() else "there is no such file"
            raise self._bad(missing) from None
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise self._bad(getattr(error, "strerror", None) or str(error)) from None

    def _copy(self, source: IO[bytes], target: IO[bytes], *, at_most: int) -> None:
        """What a zip unpacks to can be very much."""
        while piece := source.read(PIECE_BYTES):
            at_most -= len(piece)
            if at_most < 0:
                raise self._bad("it is larger than it says")
            target.write(piece)

    def _bad(self, why: str) -> InputError:
        hint = "`tuneyard bundle JOB` writes one"
        return InputError(f"{self.path} is no bundle: {why}.", code="bad_bundle", hint=hint)


def differences(then: Said, now: Said) -> list[Difference]:
    """What two runs followed from that is not the same, results aside."""
    return list(_differences(then, now))


def _differences(then: Said, now: Said) -> Iterator[Difference]:
    yield from _compared(_asked(then), _asked(now))
    if then.get("seed") != now.get("seed"):
        yield Difference("seed", then.get("seed"), now.get("seed"))
    inputs = [{k: v["sha256"] for k, v in each["inputs"].items()} for each in (then, now)]
    yield from _compared(*inputs)
    for part in ("versions", "platform"):
        yield from _compared(then[part], now[part])
    if then.get("went_on_from") != now.get("went_on_from"):
        yield Difference("went on from", then.get("went_on_from"), now.get("went_on_from"))


def _asked(about: Said) -> dict[str, Any]:
    """The spec's own arguments, for inputs are compared by what is in them."""
    aside = {*OF_THE_JOB, *about["inputs"]} - {"device", "gpus"}
    return {name: value for name, value in about["spec"].items() if name not in aside}


def _compared(then: Said, now: Said) -> Iterator[Difference]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield Difference(name, then.get(name, "unset"), now.get(name, "unset"))


def weights_of(about: Said) -> dict[str, str]:
    """Name -> sha256 of the files that hold what was learned."""
    result: Mapping[str, str] = about["result"]
    return {name: sha for name, sha in result.items() if name.endswith(".safetensors")}
