"""`tuneyard bundle` and `tuneyard rerun` against recorded answers."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command
from support.recorded_api import (
    Answer,
    RecordedApi,
    a_file,
    a_job,
    events,
    ids,
    moved,
    page,
    recorded_api,
)

JOB, AGAIN = ids("job", 2)
FILE, OTHER_FILE = ids("file", 2)
BASE, OTHER_BASE = ids("base", 2)
ADAPTER, REPORTS = ids("artifact", 2)
ROWS = b'{"instruction": "a", "output": "b"}\n'
ROWS_SHA256 = hashlib.sha256(ROWS).hexdigest()
SPEC = {"kind": "finetune", "model": "smollm2", "dataset": "rows.jsonl", "seed": 7}
RAN = {
    "format": 1,
    "inputs": {
        "model": {"id": BASE, "sha256": "b" * 64, "source": "hf:a/b", "revision": "main"},
        "dataset": {"id": FILE, "sha256": ROWS_SHA256},
    },
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "platform": {"threads": 1, "processor": "A"},
}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedApi]:
    with recorded_api("") as api:
        for name, value in api.env.items():
            monkeypatch.setenv(name, value)
        yield api


@pytest.fixture
def tuneyard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    return Command(monkeypatch, capsys)


def a_run(api: RecordedApi, job: str, *, weights: str = "w" * 64, **ran: Any) -> None:
    """A fine-tune that succeeded, with what it left."""
    named = {"id": job, "kind": "finetune", "state": "succeeded", "spec": SPEC, "retry_of": None}
    api.on("GET", f"/jobs/{job}", a_job(job) | named | {"name": "tuny"} | ran.pop("shown", {}))
    warned = {"seq": 1, "type": "warning", "data": {"message": "bf16 is slow here"}}
    api.on("GET", f"/jobs/{job}/events", page(warned))
    known = {"bytes": 9, "digest": "d" * 64, "step": None}
    reports, adapter = ({"id": REPORTS, "kind": "reports"}, {"id": ADAPTER, "kind": "adapter"})
    api.on("GET", f"/jobs/{job}/artifacts", page(reports | known, adapter | known))
    content = json.dumps(RAN | ran).encode()
    folder = f"/jobs/{job}/artifacts/{ADAPTER}/files"
    sha256 = hashlib.sha256(content).hexdigest()
    files = [
        {"path": "adapter_model.safetensors", "size": 9, "sha256": weights},
        {"path": "reproduction.json", "size": len(content), "sha256": sha256},
    ]
    api.on("GET", folder, page(*files))
    api.on("GET", f"{folder}/reproduction.json", Answer(content))


def a_server(api: RecordedApi, *, files: list[Any] = (), models: list[Any] = ()) -> None:
    """A server with these things, on which the job that is submitted succeeds."""
    api.on("GET", "/files", page(*files))
    api.on("GET", "/models", page(*models))
    api.on("POST", "/jobs", Answer(a_job(AGAIN), 201))


def a_bundle(tuneyard: Command, api: RecordedApi, *options: str, **run: Any) -> Path:
    a_run(api, JOB, **run)
    api.on("GET", f"/files/{FILE}", a_file(FILE, name="rows.jsonl", sha256=ROWS_SHA256))
    api.on("GET", f"/files/{FILE}/content", Answer(ROWS))
    assert tuneyard("bundle", JOB, "--out", "tuny.zip", *options).code == 0
    return Path("tuny.zip")


def test_a_bundle_says_what_the_run_followed_from_and_came_to(tuneyard, api):
    with zipfile.ZipFile(a_bundle(tuneyard, api)) as archive:
        assert archive.namelist() == ["bundle.json", "reproduction.json"]
        about = json.loads(archive.read("bundle.json"))
    assert about.items() >= (RAN | {"job": JOB, "name": "tuny", "spec": SPEC}).items()
    assert about["result"]["adapter_model.safetensors"] == "w" * 64
    assert about["warnings"] == ["bf16 is slow here"]
    assert about["went_on_from"] is None


def test_a_retrys_bundle_says_whose_checkpoint_it_went_on_from(tuneyard, api):
    with zipfile.ZipFile(a_bundle(tuneyard, api, shown={"retry_of": AGAIN})) as archive:
        assert json.loads(archive.read("bundle.json"))["went_on_from"] == AGAIN


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        ({"kind": "merge"}, "fine-tunes alone"),
        ({"state": "running"}, "it has no result"),
    ],
)
def test_what_has_no_bundle_is_refused(tuneyard, api, shown, code):
    a_run(api, JOB, shown=shown)
    done = tuneyard("bundle", JOB)
    assert done.code == 2
    assert code in done.err
    assert not list(Path().glob("*.zip"))


def test_a_rerun_names_each_input_by_the_id_that_it_has_here(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_server(
        api,
        files=[a_file(OTHER_FILE, name="elsewhere", sha256=ROWS_SHA256)],
        models=[{"id": OTHER_BASE, "digest": "b" * 64}],
    )
    a_run(api, AGAIN)
    api.on("GET", f"/jobs/{AGAIN}/events", events(moved(1, "succeeded", "succeeded")), page())
    done = tuneyard("rerun", str(bundle), "--json")
    (asked,) = api.requests("POST", "/jobs")
    assert asked.json == SPEC | {
        "name": "tuny again",
        "model": OTHER_BASE,
        "dataset": OTHER_FILE,
        "metadata": {"rerun_of": JOB},
    }
    assert (done.code, json.loads(done.out)["same"]) == (0, True)


def test_data_that_came_along_are_uploaded_where_they_lack(tuneyard, api):
    bundle = a_bundle(tuneyard, api, "--with-data")
    a_server(api)
    made = a_file(OTHER_FILE, name="rows.jsonl", sha256=ROWS_SHA256)
    api.on("POST", "/files", Answer(made, 201))
    a_run(api, AGAIN)
    api.on("GET", f"/jobs/{AGAIN}/events", events(moved(1, "succeeded", "succeeded")), page())
    assert tuneyard("rerun", str(bundle), "--json").code == 0
    (upload,) = api.requests("POST", "/files")
    assert ROWS in upload.body
    (asked,) = api.requests("POST", "/jobs")
    assert (asked.json["dataset"], asked.json["model"]) == (OTHER_FILE, BASE)


def test_data_that_are_nowhere_are_asked_for_by_their_sha256(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_server(api)
    done = tuneyard("rerun", str(bundle))
    assert done.code == 2
    assert ROWS_SHA256 in done.err
    assert "--with-data" in done.err
    assert not api.requests("POST", "/jobs")


def test_a_base_that_is_not_here_is_named_with_its_source(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_server(api, files=[a_file(FILE, name="rows.jsonl", sha256=ROWS_SHA256)])
    error = {"code": "model_not_found", "message": "There is no model.", "field": "model"}
    api.on("POST", "/jobs", Answer({"error": error}, 404))
    done = tuneyard("rerun", str(bundle))
    assert done.code == 3
    assert "tuneyard download hf:a/b --revision main" in done.err


def test_other_weights_are_said_with_all_that_differs(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_run(
        api,
        AGAIN,
        weights="x" * 64,
        platform={"threads": 2, "processor": "A"},
        versions={"torch": "2.11.0"},
        inputs=RAN["inputs"] | {"dataset": {"id": OTHER_FILE, "sha256": "e" * 64}},
        shown={"spec": SPEC | {"learning_rate": 0.5}},
    )
    done = tuneyard("rerun", str(bundle), "--compare", AGAIN)
    assert done.code == 1
    assert f"other weights: adapter_model.safetensors  sha256 {'w' * 64} then" in done.out
    for line in (
        "threads: 1 then, 2 now",
        "torch: 2.13.0 then, 2.11.0 now",
        f"dataset: {ROWS_SHA256} then, {'e' * 64} now",
        "learning_rate: unset then, 0.5 now",
    ):
        assert line in done.out
    assert "processor" not in done.out


def test_other_weights_without_a_reason_are_said_to_have_none(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_run(api, AGAIN, weights="x" * 64)
    done = tuneyard("rerun", str(bundle), "--compare", AGAIN)
    assert done.code == 1
    assert "nothing that is written down differs" in done.err


def test_a_rerun_that_fails_says_so(tuneyard, api):
    bundle = a_bundle(tuneyard, api)
    a_server(api, files=[a_file(FILE, name="rows.jsonl", sha256=ROWS_SHA256)])
    a_run(api, AGAIN, shown={"state": "failed", "error": {"code": "bug", "message": "oh"}})
    api.on("GET", f"/jobs/{AGAIN}/events", events(moved(1, "failed", "failed")))
    done = tuneyard("rerun", str(bundle), "--json")
    assert done.code == 1
    assert "bug: oh" in done.err


def zip_of(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_json", ".json"), content)
    return path


BAD = {
    "missing": ("nothing.zip", "there is no such file"),
    "no zip": (lambda p: p.write_text("hello") and p, "not a zip file"),
    "an empty zip": (lambda p: zip_of(p), "it has no bundle.json"),
    "no JSON": (lambda p: zip_of(p, bundle_json="{"), "cannot be read"),
    "a list": (lambda p: zip_of(p, bundle_json="[]"), "cannot be read"),
    "half": (lambda p: zip_of(p, bundle_json='{"format": 1}'), "cannot be read"),
    "a newer one": (
        lambda p: zip_of(p, bundle_json=json.dumps({**RAN, **WHOLE, "format": 2})),
        "another version",
    ),
    "a wrong part": (
        lambda p: zip_of(p, bundle_json=json.dumps({**RAN, **WHOLE, "result": []})),
        "lacks something",
    ),
}
WHOLE = {"job": JOB, "name": "n", "spec": SPEC, "result": {}}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_bundle_is_refused_in_a_sentence(tuneyard, api, tmp_path, what):
    made, expected = BAD[what]
    path = made if isinstance(made, str) else made(tmp_path / "bad.zip")
    done = tuneyard("rerun", str(path))
    assert done.code == 2
    assert expected in done.err
    assert "tuneyard bundle JOB" in done.err
    assert not api.asked


@pytest.mark.parametrize(
    ("entry", "content", "expected"),
    [
        ({"file": "../../etc/passwd", "bytes": 9}, ROWS, "it names"),
        ({"file": "/etc/passwd", "bytes": 9}, ROWS, "it names"),
        ({"file": "data/rows.jsonl", "bytes": 3}, ROWS, "larger than it says"),
        ({"file": "data/rows.jsonl", "bytes": 99}, b"others\n", "not the file that trained"),
    ],
)
def test_data_are_taken_from_a_bundle_with_care(tuneyard, api, tmp_path, entry, content, expected):
    inputs = {"dataset": RAN["inputs"]["dataset"] | entry}
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("bundle.json", json.dumps({**RAN, **WHOLE, "inputs": inputs}))
        archive.writestr("data/rows.jsonl", content)
    a_server(api)
    done = tuneyard("rerun", "bad.zip")
    assert done.code == 2
    assert expected in done.err
    assert not api.requests("POST", "/files")
